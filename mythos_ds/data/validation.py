"""How much held-out text a run has, beside what its evaluations ask for: told before training starts. No torch."""

from dataclasses import dataclass
from pathlib import Path

from mythos_ds.config.schema import DataConfig, DatasetConfig, TrainingConfig
from mythos_ds.data.builtin import BuiltinData
from mythos_ds.data.dataset_info import DatasetInfo, dataset_files, documents_of, read_info
from mythos_ds.data.packing import usable_tokens
from mythos_ds.data.token_files import open_lengths
from mythos_ds.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a run."""

    tokens: int
    needed: int
    """Of an evaluation at one loop count."""
    exact: bool
    """Counted, not computed from the share of documents."""

    @property
    def text(self) -> str:
        """The two numbers in words."""
        about = "" if self.exact else "about "
        return f"{about}{self.tokens:,} tokens there, {self.needed:,} needed by an evaluation"


def held_out(data: DataConfig, training: TrainingConfig, *, exact: bool = False) -> HeldOut | None:
    """The held-out text, as far as its datasets are here; None without validation, or where they are not.

    exact: count the tokens of a share's documents, which reads the index files. Raises DataError where there is no
    text, though there should be.
    """
    needed = training.eval_batches * training.global_batch_size * training.seq_len + 1
    if not data.validates:
        return None
    own = data.own_validation
    prefixes = [Path(dataset.prefix) for dataset in own] or _shared_prefixes(data)
    if not all(path.is_file() for prefix in prefixes for path in dataset_files(prefix)):
        return None
    infos = [read_info(prefix) for prefix in prefixes]
    if own:
        for prefix, info in zip(prefixes, infos, strict=True):
            if info.tokens < 2:
                raise DataError(
                    f"data.validation: {prefix} holds {info.tokens} tokens; {needed:,} are needed", code="MDS418"
                )
        whole = (
            _tokens(prefix, info, range(info.documents), training) for prefix, info in zip(prefixes, infos, strict=True)
        )
        return HeldOut(sum(whole), needed, True)
    count = _counted if exact else _estimated
    return HeldOut(
        sum(count(prefix, info, data, training, needed) for prefix, info in zip(prefixes, infos, strict=True)),
        needed,
        exact,
    )


def validation_notes(data: DataConfig, training: TrainingConfig, *, exact: bool = False) -> list[str]:
    """What there is to say of a run's validation before it starts: that there is none, or too little. DataError."""
    if not data.validates:
        why = '"none"' if data.validation is not None else f"the valid share of data.split {list(data.split)} is 0"
        return [f"no validation ({why}): no held-out loss is computed"]
    found = held_out(data, training, exact=exact)
    if found is None or found.tokens >= found.needed:
        return []
    times = -(-found.needed // max(found.tokens, 1))
    per_batch = training.global_batch_size * training.seq_len
    fits = (found.tokens - 1) // per_batch
    fewer = f"training.eval_batches={fits}" if fits else f"{per_batch + 1:,} tokens for training.eval_batches=1"
    return [
        f"little validation text: {found.text} (eval_batches {training.eval_batches} x global_batch_size "
        f"{training.global_batch_size} x seq_len {training.seq_len} + 1), so each evaluation reads it up to {times} "
        f"times; enough: {fewer}, more text, or data.validation"
    ]


def held_out_documents(data: DataConfig) -> list[tuple[Path, range]]:
    """The datasets that have held-out text, and the numbers of its documents in each. Raises DataError for files that
    are not there."""
    if data.own_validation:
        prefixes = [Path(dataset.prefix) for dataset in data.own_validation]
        return [(prefix, range(read_info(prefix).documents)) for prefix in prefixes]
    return [
        (prefix, documents_of(data.used_split, "valid", read_info(prefix).documents))
        for prefix in _shared_prefixes(data)
    ]


def _shared_prefixes(data: DataConfig) -> list[Path]:
    """Datasets of which a share is trained on."""
    datasets = data.datasets or [DatasetConfig(prefix=str(BuiltinData.under(Path(data.data_dir)).prefix))]
    return [Path(dataset.prefix) for dataset in datasets]


def _tokens(prefix: Path, info: DatasetInfo, documents: range, training: TrainingConfig) -> int:
    """Tokens that samples take of some documents."""
    if info.is_chat:
        return usable_tokens(prefix, documents, training.seq_len)
    if len(documents) == info.documents:
        return info.tokens
    return int(open_lengths(prefix)[documents.start : documents.stop].sum())


def _estimated(prefix: Path, info: DatasetInfo, data: DataConfig, training: TrainingConfig, needed: int) -> int:
    documents = documents_of(data.used_split, "valid", info.documents)
    if not documents:
        raise DataError(
            f"{prefix}: data.split {list(data.used_split)} leaves no valid text of its {info.documents} documents, and "
            f"{needed:,} tokens are needed; give a larger share, data.validation, or 0 for no validation",
            code="MDS417",
        )
    return info.tokens * len(documents) // info.documents


def _counted(prefix: Path, info: DatasetInfo, data: DataConfig, training: TrainingConfig, needed: int) -> int:
    _estimated(prefix, info, data, training, needed)
    return _tokens(prefix, info, documents_of(data.used_split, "valid", info.documents), training)
