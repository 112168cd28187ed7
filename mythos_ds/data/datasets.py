"""From the configuration's `data` section to training and validation samples."""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.config.schema import DataConfig
from mythos_ds.data import megatron
from mythos_ds.data.builtin import existing_builtin, prepare_builtin
from mythos_ds.data.dataset_info import DatasetInfo, read_info
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError
from mythos_ds.io import published_directory, write_json

_INDEX_FORMAT = 1
_COMPLETE = "complete.json"


class TokenDataset:
    """Samples of packed documents: {tokens, targets, positions}, each int64 [seq].

    targets are the next tokens, all of them count. positions start again at 0 with each document when
    `document_mask`, else they are 0 .. seq - 1.
    """

    def __init__(self, samples: Any, *, length: int, eos_id: int, document_mask: bool):
        self._samples, self._length = samples, length
        self._eos_id, self._document_mask = eos_id, document_mask

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample = self._samples[index]
        tokens, targets = sample["tokens"].numpy(), sample["labels"].numpy()
        return {"tokens": tokens, "targets": targets, "positions": self._positions(tokens)}

    def _positions(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self._document_mask:
            return np.arange(len(tokens), dtype=np.int64)
        return document_positions(tokens, self._eos_id)


def document_positions(tokens: NDArray[np.int64], eos_id: int) -> NDArray[np.int64]:
    """Distance of each token [seq] from its document's, or the sample's, start; `eos_id` ends a document."""
    places = np.arange(len(tokens), dtype=np.int64)
    starts = np.zeros_like(places)
    after_end = np.flatnonzero(tokens[:-1] == eos_id) + 1
    starts[after_end] = after_end
    return places - np.maximum.accumulate(starts)


@dataclass(frozen=True)
class TokenDatasets:
    """What a run reads."""

    train: TokenDataset
    valid: TokenDataset
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """Text, tokenizer, weights and split as plain JSON values, whatever the paths and the run's length."""


def build_datasets(
    data: DataConfig, *, seq_len: int, train_samples: int, valid_samples: int, seed: int, vocab_size: int
) -> TokenDatasets:
    """Open the samples of a run; the index must have been prepared (`prepare_index_cache`). No collectives.

    The order of samples is decided by all arguments, `train_samples` included: keep it over the life of a
    run. vocab_size: rows of the model's embedding. Raises DataError for a missing, damaged or unfitting file.
    """
    request = _Request.resolve(data, seq_len, train_samples, valid_samples, seed, vocab_size)
    cache = request.cache
    if not _is_complete(cache):
        raise DataError(
            f"no index of this run's samples at {cache}. Process 0 makes it before the others read: "
            f"is data.data_dir ({data.data_dir}) a folder that every node sees?"
        )
    train, valid = (request.open(part, cache) for part in megatron.SPLITS)
    return TokenDatasets(train, valid, request.tokenizer, request.identity())


def prepare_index_cache(
    data: DataConfig, *, seq_len: int, train_samples: int, valid_samples: int, seed: int, vocab_size: int
) -> Path:
    """Make what `build_datasets` reads for the same arguments: the built-in corpus if it is asked for, and
    the index.

    Called by one process (global rank 0) before the others open the data; needs no torch.distributed and
    enters no collective. Returns the index folder, which appears in one rename.
    """
    if data.corpus == "builtin":
        prepare_builtin(Path(data.data_dir))
    request = _Request.resolve(data, seq_len, train_samples, valid_samples, seed, vocab_size)
    if not _is_complete(request.cache):
        with published_directory(request.cache) as work:
            for part in megatron.SPLITS:
                request.build(part, work)
            files = sorted(path.name for path in work.iterdir())
            write_json(work / _COMPLETE, {"arguments": request.arguments(), "files": files}, indent=2, sort_keys=True)
    return request.cache


def _is_complete(cache: Path) -> bool:
    try:
        files = json.loads((cache / _COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return False
    missing = [name for name in files if not (cache / name).is_file()]
    if missing:
        raise DataError(f"index {cache} is damaged: {missing[0]} is missing; remove the folder to have it made anew")
    return True


class _Blend:
    """Samples taken from several datasets in a prepared order."""

    def __init__(self, parts: list[Any], order: NDArray[np.int16], numbers: NDArray[np.int64]):
        self._parts, self._order, self._numbers = parts, order, numbers

    def __getitem__(self, index: int) -> Any:
        return self._parts[self._order[index]][int(self._numbers[index])]


@dataclass(frozen=True)
class _Component:
    prefix: Path
    weight: float
    info: DatasetInfo


@dataclass(frozen=True)
class _Request:
    """The data of a run with every fact known and checked."""

    components: list[_Component]
    tokenizer: Tokenizer
    plan: megatron.PackingPlan
    samples: dict[str, int]
    document_mask: bool
    data_dir: Path

    @classmethod
    def resolve(
        cls,
        data: DataConfig,
        seq_len: int,
        train_samples: int,
        valid_samples: int,
        seed: int,
        vocab_size: int,
    ) -> "_Request":
        prefixes, tokenizer_path = _sources(data)
        tokenizer = Tokenizer.load(tokenizer_path)
        components = [_Component(prefix, weight, read_info(prefix)) for prefix, weight in prefixes]
        for component in components:
            _check_vocabulary(component, tokenizer, vocab_size)
        plan = megatron.packing_plan(tokenizer, seq_len=seq_len, seed=seed, split=data.split)
        samples = {"train": train_samples, "valid": valid_samples}
        return cls(components, tokenizer, plan, samples, data.document_mask, Path(data.data_dir))

    @property
    def weights(self) -> list[float]:
        return megatron.normalised([component.weight for component in self.components])

    @property
    def cache(self) -> Path:
        key = hashlib.sha256(json.dumps(self.arguments(), sort_keys=True).encode()).hexdigest()
        return self.data_dir / "index" / key[:20]

    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.sha256,
            "content": [component.info.content_sha256 for component in self.components],
            "weights": self.weights,
            "split": list(self.plan.split),
            "document_mask": self.document_mask,
        }

    def arguments(self) -> dict[str, Any]:
        """Everything that decides the order of the samples."""
        return {
            "format": _INDEX_FORMAT,
            "megatron": importlib.metadata.version("megatron-core"),  # may name its files otherwise
            "seq_len": self.plan.seq_len,
            "seed": self.plan.seed,
            "samples": self.samples,
            **{key: value for key, value in self.identity().items() if key != "document_mask"},
        }

    def build(self, part: str, cache: Path) -> None:
        """Make the index of one part in `cache`."""
        if not self.samples[part]:
            return
        datasets = self._packed(part, cache)
        if len(datasets) == 1:
            return
        order, numbers = megatron.blend_order(self.weights, self.samples[part])
        used = np.bincount(order, minlength=len(datasets))
        for component, dataset, count in zip(self.components, datasets, used, strict=True):
            if count > len(dataset):
                raise DataError(f"{component.prefix}: blend needs {count} samples of {len(dataset)}; raise its weight")
        np.save(cache / f"{part}-blend-dataset.npy", order)
        np.save(cache / f"{part}-blend-sample.npy", numbers)

    def open(self, part: str, cache: Path) -> TokenDataset:
        """The samples of one part, from the index in `cache`."""
        length = self.samples[part]
        samples: Any = None
        if length:
            datasets = self._packed(part, cache)
            samples = datasets[0]
            if len(datasets) > 1:
                paths = [cache / f"{part}-blend-{name}.npy" for name in ("dataset", "sample")]
                samples = _Blend(datasets, *(np.load(path, mmap_mode="r") for path in paths))
        eos_id, mask = self.plan.eos_id, self.document_mask
        return TokenDataset(samples, length=length, eos_id=eos_id, document_mask=mask)

    def _packed(self, part: str, cache: Path) -> list[Any]:
        wanted = [self.samples[part]]
        if len(self.components) > 1:
            wanted = megatron.blended_counts(self.weights, self.samples[part])
        return [
            megatron.packed_samples(component.prefix, component.info.content_sha256, part, count, self.plan, cache)
            for component, count in zip(self.components, wanted, strict=True)
        ]


def _sources(data: DataConfig) -> tuple[list[tuple[Path, float]], Path]:
    """Prefixes with weights, and the tokenizer."""
    if data.corpus == "builtin":
        builtin = existing_builtin(Path(data.data_dir))
        return [(builtin.prefix, 1.0)], builtin.tokenizer
    if not data.datasets or data.tokenizer is None:
        raise DataError("data.datasets and data.tokenizer are needed where data.corpus is not given")
    return [(Path(dataset.prefix), dataset.weight) for dataset in data.datasets], Path(data.tokenizer)


def _check_vocabulary(component: _Component, tokenizer: Tokenizer, vocab_size: int) -> None:
    info, prefix = component.info, component.prefix
    if info.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix} was made with another tokenizer "
            f"(sha256 {info.tokenizer_sha256[:12]}, {info.vocab_size} pieces) "
            f"than data.tokenizer {tokenizer.path} ({tokenizer.sha256[:12]}, {tokenizer.vocab_size} pieces); "
            "prepare it again with: "
            f"mythos-ds prepare-data INPUT --tokenizer {tokenizer.path} --output {prefix} --overwrite"
        )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size {vocab_size} given, but {prefix} holds ids up to {tokenizer.vocab_size - 1}; "
            f"allowed: at least {tokenizer.vocab_size}"
        )
