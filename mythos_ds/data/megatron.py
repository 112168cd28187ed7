"""The only user of megatron-core: indexed token files, samples packed from them, and blends.

`GPTDataset` and the blending routine are used without `BlendedMegatronDatasetBuilder`: the builder enters
collectives whenever torch.distributed is up, so one process could not prepare the index alone; a test holds
that both give the same samples. Nothing here is compiled (`compile_helpers` would end the process where no
compiler is installed).
"""

import locale
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.index_files import load_array
from mythos_ds.data.token_files import read_header
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DamagedDatasetError, DataError

Part = Literal["train", "valid"]
SPLITS: tuple[Part, Part] = ("train", "valid")
_SURPLUS = 0.005  # extra samples of each blended dataset, megatron-core's default


def open_tokens(prefix: Path) -> Any:
    """megatron-core's IndexedDataset over a pair: `[i]` is document i, `.sequence_lengths` the lengths."""
    read_header(prefix)
    try:
        return _import_indexed().IndexedDataset(str(prefix))
    except (AssertionError, OSError, ValueError) as error:
        raise DamagedDatasetError(f"{prefix}.bin/.idx is no indexed dataset: {error}") from error


@dataclass(frozen=True)
class PackingPlan:
    """How documents become samples of `seq_len` + 1 tokens."""

    seq_len: int
    seed: int
    split: tuple[float, float, float]
    eos_id: int
    pad_id: int
    vocab_size: int
    tokenizer_sha256: str


def packing_plan(tokenizer: Tokenizer, *, seq_len: int, seed: int, split: tuple[float, float, float]) -> PackingPlan:
    """The plan for text of `tokenizer`."""
    return PackingPlan(seq_len, seed, split, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size, tokenizer.sha256)


def packed_samples(
    prefix: Path, content: str, part: str, samples: int, plan: PackingPlan, cache: Path, *, build: bool = False
) -> Any:
    """GPTDataset over one part ('train' or 'valid') of the documents at `prefix`, repeated to give `samples`.

    Its index is read from `cache`, or with `build` made there. `content` names the tokens in the cache's file
    names, so that moved or remade files never meet a stale index. Raises DataError when the part has too few
    tokens.
    """
    with _quiet():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split
    config = GPTDatasetConfig(
        random_seed=plan.seed,
        sequence_length=plan.seq_len,
        tokenizer=_PlainTokenizer(plan),
        blend=([str(prefix)], None),
        split=",".join(f"{weight:.10f}" for weight in plan.split),
        path_to_cache=str(cache),
        reset_position_ids=False,  # ours are computed at once, not document by document
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = open_tokens(prefix)
    documents = _documents_of(config.split_matrix[SPLITS.index(part)], len(tokens.sequence_lengths))
    available = int(tokens.sequence_lengths[documents].sum())
    if available < 2:
        count = len(tokens.sequence_lengths)
        raise DataError(
            f"{prefix}: data.split {list(plan.split)} leaves no {part} text of its {count} documents", code="MDS417"
        )
    made = GPTDataset if build else _reader_of(GPTDataset, cache)
    return made(tokens, content, documents, samples, Split[part], config)


def _reader_of(base: Any, cache: Path) -> Any:
    """The class that reads its index as plain numbers: megatron's own unpickles whatever lies in such a file."""

    class Reader(base):  # type: ignore[misc]
        def _build_document_sample_shuffle_indices(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
            stem = f"{self.unique_description_hash}-{base.__name__}-{self.index_split.name}"
            order = load_array(cache / f"{stem}-document_index.npy", 1)
            samples = load_array(cache / f"{stem}-sample_index.npy", 2)
            return order, samples, load_array(cache / f"{stem}-shuffle_index.npy", 1)

    Reader.__name__ = base.__name__  # which is part of the names of the files
    return Reader


def _documents_of(bounds: tuple[float, float] | None, count: int) -> NDArray[np.int32]:
    if bounds is None:
        return np.zeros(0, dtype=np.int32)
    return np.arange(round(bounds[0] * count), round(bounds[1] * count), dtype=np.int32)


def blended_counts(weights: Sequence[float], samples: int) -> list[int]:
    """Samples to build of each dataset so that a blend of `samples` never runs out of one."""
    shares = [int(np.ceil(samples * weight)) for weight in normalised(weights)]
    return [int(np.ceil(share * (1 + _SURPLUS))) for share in shares]


def blend_order(weights: Sequence[float], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """For each sample of a blend the dataset it is taken from and its number there, both [samples]."""
    with _quiet():
        from megatron.core.datasets import helpers
    dataset = np.zeros(samples, dtype=np.int16)
    sample = np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(dataset, sample, normalised(weights), len(weights), samples, False)
    return dataset, sample


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    total = sum(weights)
    return [weight / total for weight in weights]


class _PlainTokenizer:
    """What GPTDataset asks of a tokenizer. The digest, not a path, goes into the cache's names."""

    def __init__(self, plan: PackingPlan):
        self.vocab_size = plan.vocab_size
        self.eod = plan.eos_id
        self.pad = plan.pad_id
        self.unique_identifiers = {"class": "sentencepiece", "sha256": plan.tokenizer_sha256}


def _import_indexed() -> Any:
    with _quiet():
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that Transformer Engine and Apex, which are not used, are absent; and in a locale that reads
    UTF-8, as torch's own sources need it."""
    logging.getLogger("megatron").setLevel(logging.WARNING)
    with warnings.catch_warnings(), _utf8_locale():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _utf8_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_CTYPE)
    ascii_only = locale.getencoding().lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
    try:
        if ascii_only:
            with suppress(locale.Error):  # a system without it
                locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        yield
    finally:
        if ascii_only:
            locale.setlocale(locale.LC_CTYPE, before)
