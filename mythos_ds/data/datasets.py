"""From the configuration's `data` section to training and validation samples."""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.config.schema import IGNORED_LABEL, DataConfig
from mythos_ds.data import megatron
from mythos_ds.data.builtin import existing_builtin, prepare_builtin
from mythos_ds.data.dataset_info import DatasetInfo, read_info
from mythos_ds.data.index_files import check_digests, check_samples, is_complete, load_array, mark_complete
from mythos_ds.data.packing import ConversationSource
from mythos_ds.data.token_files import pair_faults
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DamagedDatasetError, DamagedIndexError, DataError, RankError
from mythos_ds.io import published_directory
from mythos_ds.log import get_logger

_INDEX_FORMAT = 2
_HELD_OUT = (0.0, 100.0, 0.0)
"""The split of a dataset that is validation text as a whole."""
_FIRST_USE_BYTES = 8 << 30
_CONVERSATIONS = 1
"""Format of the index of packed conversations."""

_logger = get_logger(__name__)


class DamagedSampleError(DataError, RankError):
    """Tokens that one rank reads are not those that were prepared."""

    code = "MDS401"


class TokenDataset:
    """Samples of packed documents: {tokens, targets, positions}, each int64 [seq].

    targets are the next tokens. All of them count, or, where `masked`, those that are not -100, and each sample also
    says how many: counted, int64 []. positions start again at 0 with each document when `document_mask`, else they are
    0 .. seq - 1. Raises DamagedSampleError for an id that is none of `vocab_size`.
    """

    def __init__(self, samples: Any, *, length: int, masked: bool, vocab_size: int, source: str):
        self._samples, self._length, self._masked = samples, length, masked
        self._vocab_size, self._source = vocab_size, source

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        try:
            sample = self._samples[index]
        except (IndexError, ValueError, OSError) as error:  # of an index that points outside of the text
            raise DamagedSampleError(self._damage(index, f"not readable ({error})")) from error
        for ids in (sample["tokens"], sample["targets"]):
            ids = ids[ids != IGNORED_LABEL] if self._masked else ids
            if ids.min(initial=0) < 0 or ids.max(initial=0) >= self._vocab_size:
                wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
                raise DamagedSampleError(self._damage(index, f"id {wrong} given; allowed: 0 .. {self._vocab_size - 1}"))
        if self._masked and "counted" not in sample:  # of text, beside conversations
            sample = {**sample, "counted": np.array(len(sample["targets"]), dtype=np.int64)}
        return sample

    def _damage(self, index: int, what: str) -> str:
        return (
            f"{self._source}: sample {index}: {what}; the files are damaged: "
            "mythos-ds verify PREFIX --full names the document"
        )


class _Text:
    """Samples of text, out of those of megatron-core."""

    def __init__(self, packed: Any, *, eos_id: int, document_mask: bool):
        self.packed, self._eos_id, self._document_mask = packed, eos_id, document_mask

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        made = self.packed[index]
        tokens, targets = made["tokens"].numpy(), made["labels"].numpy()
        places = (
            document_positions(tokens, self._eos_id) if self._document_mask else np.arange(len(tokens), dtype=np.int64)
        )
        return {"tokens": tokens, "targets": targets, "positions": places}


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
    """Of length 0 without validation."""
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
    if not is_complete(cache):
        raise DataError(
            f"no index of this run's samples at {cache}. Process 0 makes it before the others read: "
            f"is data.data_dir ({data.data_dir}) a folder that every node sees?",
            code="MDS415",
        )
    train, valid = (request.open(part, cache) for part in megatron.SPLITS)
    return TokenDatasets(train, valid, request.tokenizer, request.identity())


def data_identity(data: DataConfig, vocab_size: int) -> dict[str, Any] | None:
    """What the configured text is, as a run pins it, by what stands beside it; None of the built-in corpus, and where
    the text or the tokenizer is not here or does not fit."""
    try:
        return None if data.corpus is not None else _Request.resolve(data, 2, 0, 0, 0, vocab_size).identity()
    except DataError:
        return None


def check_sources(data: DataConfig, vocab_size: int) -> None:
    """Raises DataError where the configured text and tokenizer are not here or do not fit; reads no text and writes
    nothing. The built-in corpus is made when it is needed."""
    if data.corpus is None:
        _Request.resolve(data, 2, 0, 0, 0, vocab_size)


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
    made = is_complete(request.cache)
    request.check_tokens(first_use=not made)
    if made:
        check_digests(request.cache)
        for part in megatron.SPLITS:
            request.check(part)
        request.report()
        return request.cache
    if request.cache.exists():
        raise DamagedIndexError(
            f"index {request.cache} is damaged: no complete.json; remove the folder to have it made anew"
        )
    with published_directory(request.cache) as work:
        for part in megatron.SPLITS:
            request.build(part, work)
        mark_complete(work, request.arguments())
    request.report()
    return request.cache


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
    loss_mask: bool | None
    data_dir: Path
    held_out: list[_Component]
    """Validation text of its own; none where it is a share of the others."""

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
        prefixes, tokenizer_path = data_sources(data)
        tokenizer = Tokenizer.load(tokenizer_path)
        components = [_Component(prefix, weight, read_info(prefix)) for prefix, weight in prefixes]
        held_out = [
            _Component(Path(one.prefix), one.weight, read_info(Path(one.prefix))) for one in data.own_validation
        ]
        for component in (*components, *held_out):
            check_vocabulary(component.prefix, component.info, tokenizer, vocab_size)
        _check_conversations([*components, *held_out], data.loss_mask)
        plan = megatron.packing_plan(tokenizer, seq_len=seq_len, seed=seed, split=data.used_split)
        samples = {"train": train_samples, "valid": valid_samples if data.validates else 0}
        masks = data.document_mask, data.loss_mask
        return cls(components, tokenizer, plan, samples, *masks, Path(data.data_dir), held_out)

    @property
    def weights(self) -> list[float]:
        return _weights_of(self.components)

    @property
    def cache(self) -> Path:
        key = hashlib.sha256(json.dumps(self.arguments(), sort_keys=True).encode()).hexdigest()
        return self.data_dir / "index" / key[:20]

    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.sha256,
            "content": [component.info.identity for component in self.components],
            "weights": self.weights,
            "split": list(self.plan.split),
            "document_mask": self.document_mask,
            **({"validation": _named(self.held_out)} if self.held_out else {}),
            **({"conversations": self._chat()} if self._chats else {}),
        }

    @property
    def _chats(self) -> list[DatasetInfo]:
        """What is known of the datasets that are conversations."""
        return [component.info for component in (*self.components, *self.held_out) if component.info.is_chat]

    def _chat(self) -> dict[str, Any]:
        """What conversations add to a run's identity, and what a model that learnt from them is told."""
        ends = sorted({number for info in self._chats for number in info.turn_ends})
        used = self.loss_mask is not False
        return {
            "packing": _CONVERSATIONS,
            "loss_mask": used,
            "chat_template": self._chats[0].chat_template,
            "ends": ends,
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

    def build(self, part: megatron.Part, cache: Path) -> None:
        """Make the index of one part in `cache`."""
        if not self.samples[part]:
            return
        datasets = self._samples(part, cache, build=True)
        if len(datasets) == 1:
            return
        components = self._components_of(part)
        order, numbers = megatron.blend_order(_weights_of(components), self.samples[part])
        used = np.bincount(order, minlength=len(datasets))
        for component, dataset, count in zip(components, datasets, used, strict=True):
            if count > len(dataset):
                raise DataError(f"{component.prefix}: blend needs {count} samples of {len(dataset)}; raise its weight")
        np.save(cache / f"{part}-blend-dataset.npy", order)
        np.save(cache / f"{part}-blend-sample.npy", numbers)

    def open(self, part: megatron.Part, cache: Path) -> TokenDataset:
        """The samples of one part, from the index in `cache`."""
        length = self.samples[part]
        samples: Any = None
        if length:
            datasets = self._samples(part, cache)
            samples = datasets[0]
            if len(datasets) > 1:
                samples = _Blend(datasets, *self._blend_arrays(part, cache))
        source = ", ".join(str(component.prefix) for component in self._components_of(part))
        return TokenDataset(
            samples,
            length=length,
            masked=any(component.info.is_chat for component in self._components_of(part)),
            vocab_size=self.plan.vocab_size,
            source=source,
        )

    def _blend_arrays(self, part: str, cache: Path) -> tuple[NDArray[Any], NDArray[Any]]:
        order, numbers = (load_array(cache / f"{part}-blend-{name}.npy", 1) for name in ("dataset", "sample"))
        if len(order) != self.samples[part] or len(numbers) != self.samples[part]:
            raise DamagedIndexError(
                f"index {cache} is damaged: {part}-blend-*.npy; remove the folder to have it made anew"
            )
        return order, numbers

    def check(self, part: megatron.Part) -> None:
        """Check that the index of one part points into the text only. Raises DataError."""
        if not self.samples[part]:
            return
        datasets = self._samples(part, self.cache)
        for place, (component, made) in enumerate(zip(self._components_of(part), datasets, strict=True)):
            if component.info.is_chat:
                self._source(place, part).check(part, self.cache)
                continue
            packed = made.packed
            arrays = (packed.document_index, packed.sample_index, packed.shuffle_index)
            check_samples(self.cache, packed.indices, *arrays, packed.dataset.sequence_lengths)
        if len(datasets) > 1:
            order, numbers = self._blend_arrays(part, self.cache)
            sizes = np.array([len(made) for made in datasets])
            if order.min() < 0 or order.max() >= len(datasets) or numbers.min() < 0 or (numbers >= sizes[order]).any():
                raise DamagedIndexError(
                    f"index {self.cache} is damaged: {part}-blend-*.npy; remove the folder to have it anew"
                )
        elif len(datasets[0]) < self.samples[part]:
            raise DamagedIndexError(
                f"index {self.cache} is damaged: too few samples; remove the folder to have it made anew"
            )

    def check_tokens(self, *, first_use: bool) -> None:
        """Compare the token files with what was written: at their first use whole, where they are not very large."""
        for component in [*self.components, *self.held_out]:
            full = first_use and component.info.bin_bytes <= _FIRST_USE_BYTES
            faults = pair_faults(component.prefix, component.info, full=full)
            if faults:
                chat = " --chat" if component.info.is_chat else ""
                command = f"mythos-ds prepare-data INPUT{chat} --output {component.prefix} --overwrite"
                again = f"prepare the data again: {command}"
                raise DamagedDatasetError(f"{faults[0]}; {again}")

    def report(self) -> None:
        """Say how the conversations of each part were packed, and which of their tokens count."""
        for part in megatron.SPLITS:
            for place, component in enumerate(self._components_of(part) if self.samples[part] else ()):
                if component.info.is_chat:
                    made = self._source(place, part).report(part, self.cache)
                    _logger.info("%s (%s): %s", component.prefix, part, made.text)
        if self._chats and self.loss_mask is False:
            _logger.info("data.loss_mask false: every token of the conversations counts in the loss")

    def _samples(self, part: megatron.Part, cache: Path, *, build: bool = False) -> list[Any]:
        components, wanted = self._components_of(part), [self.samples[part]]
        if len(components) > 1:
            wanted = megatron.blended_counts(_weights_of(components), self.samples[part])
        found: list[Any] = []
        for place, (component, count) in enumerate(zip(components, wanted, strict=True)):
            if component.info.is_chat:
                source = self._source(place, part)
                if build:
                    source.build(part, count, cache)
                found.append(source.open(part, cache))
                continue
            content = component.info.content_sha256
            packed = megatron.packed_samples(
                component.prefix, content, part, count, self._plan_of(part), cache, build=build
            )
            found.append(_Text(packed, eos_id=self.plan.eos_id, document_mask=self.document_mask))
        return found

    def _source(self, place: int, part: megatron.Part) -> ConversationSource:
        masks = {"masked": self.loss_mask is not False, "document_mask": self.document_mask}
        component = self._components_of(part)[place]
        return ConversationSource(component.prefix, component.info, self._plan_of(part), number=place, **masks)

    def _plan_of(self, part: megatron.Part) -> megatron.PackingPlan:
        return replace(self.plan, split=_HELD_OUT) if self._is_own(part) else self.plan

    def _is_own(self, part: str) -> bool:
        return part == "valid" and bool(self.held_out)

    def _components_of(self, part: str) -> list[_Component]:
        return self.held_out if self._is_own(part) else self.components


def _weights_of(components: list[_Component]) -> list[float]:
    return megatron.normalised([component.weight for component in components])


def _named(components: list[_Component]) -> dict[str, Any]:
    return {"content": [one.info.identity for one in components], "weights": _weights_of(components)}


def data_sources(data: DataConfig) -> tuple[list[tuple[Path, float]], Path]:
    """The prefixes of a run's datasets with their weights, and its tokenizer. Raises DataError for none."""
    if data.corpus == "builtin":
        builtin = existing_builtin(Path(data.data_dir))
        return [(builtin.prefix, 1.0)], builtin.tokenizer
    if not data.datasets or data.tokenizer is None:
        raise DataError("data.datasets and data.tokenizer are needed where data.corpus is not given", code="MDS411")
    return [(Path(dataset.prefix), dataset.weight) for dataset in data.datasets], Path(data.tokenizer)


def _check_conversations(components: list[_Component], loss_mask: bool | None) -> None:
    """Raises DataError where data.loss_mask fits no dataset, or two of them were made with different chat templates."""
    chats = [component for component in components if component.info.is_chat]
    text = next((component for component in components if not component.info.is_chat), None)
    if loss_mask and text is not None:
        raise DataError(
            f"data.loss_mask: true given, but {text.prefix} is text, of which every token counts; allowed: "
            "conversations, made by mythos-ds prepare-data --chat; nearest: null, which uses a mask where there is one",
            code="MDS416",
        )
    if loss_mask is False and not chats:
        raise DataError(
            "data.loss_mask: false given, but no dataset has a mask: it has no effect; remove it", code="MDS416"
        )
    other = next((each for each in chats if each.info.chat_template != chats[0].info.chat_template), None)
    if other is not None:
        raise DataError(
            f"{chats[0].prefix} and {other.prefix} were made with different chat templates; a model has one: prepare "
            "one of them again",
            code="MDS435",
        )


def check_vocabulary(prefix: Path, info: DatasetInfo, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError where a dataset is not of this tokenizer, or has more ids than a model has rows."""
    if info.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix} was made with another tokenizer "
            f"(sha256 {info.tokenizer_sha256[:12]}, {info.vocab_size} pieces) "
            f"than data.tokenizer {tokenizer.path} ({tokenizer.sha256[:12]}, {tokenizer.vocab_size} pieces); "
            "prepare it again with: "
            f"mythos-ds prepare-data INPUT{' --chat' if info.is_chat else ''} --tokenizer {tokenizer.path} "
            f"--output {prefix} --overwrite",
            code="MDS412",
        )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size {vocab_size} given, but {prefix} holds ids up to {tokenizer.vocab_size - 1}; "
            f"allowed: at least {tokenizer.vocab_size}",
            code="MDS413",
        )
