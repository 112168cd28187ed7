"""The JSON file beside a .bin/.idx pair: what made it, and the mark that it is complete."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from mythos_ds.errors import DamagedDatasetError, DataError
from mythos_ds.io import read_json, where_searched, write_json

FORMAT = 1
_OF_CHATS = ("mask_sha256", "counted_tokens", "chat_template", "turn_ends")


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of one indexed dataset. It is written last: without it, the pair does not count as a dataset."""

    documents: int
    tokens: int
    """End-of-document ids included."""
    skipped_documents: int
    """Empty inputs."""
    text_bytes: int
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    content_sha256: str
    """Of the tokens and document lengths in file order."""
    shuffle_seed: int | None
    """None when documents were kept in input order."""
    sources: tuple[str, ...]
    bin_bytes: int
    idx_bytes: int
    format: int = FORMAT
    bad_rows: int = 0
    """Rows that `--on-bad-row skip` left out."""
    bad_row_examples: tuple[str, ...] = ()
    """The first of them: place and reason."""
    mask_sha256: str | None = None
    """Of the .mask file, which says of each token whether it counts in the loss; None for text, all of which does."""
    counted_tokens: int = 0
    """Of conversations: tokens that the assistant is to write."""
    chat_template: str | None = None
    """Of conversations: what made tokens of them."""
    turn_ends: tuple[int, ...] = ()
    """Of conversations: ids of the chat template's own tokens that end the assistant's turns."""

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return self.mask_sha256 is not None

    @property
    def identity(self) -> str:
        """Names the tokens, and which of them count."""
        return self.content_sha256 if self.mask_sha256 is None else f"{self.content_sha256}:{self.mask_sha256}"


def dataset_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Paths of tokens, index and sidecar. Raises DataError for a prefix that no file name can begin with."""
    require_name(prefix)
    return tuple(prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx", ".json"))  # type: ignore[return-value]


def documents_of(split: Sequence[float], part: Literal["train", "valid"], count: int) -> range:
    """Numbers of the documents that a part has of `count`; split: shares of train, valid and test."""
    start, end = [0.0, *accumulate(share / sum(split) for share in split)][part == "valid" :][:2]
    return range(round(start * count), round(end * count))


def mask_file(prefix: Path) -> Path:
    """Path of what says of each token of conversations whether it counts in the loss, a byte for each."""
    require_name(prefix)
    return prefix.with_name(prefix.name + ".mask")


def require_name(prefix: Path) -> None:
    """Raises DataError for a prefix such as "", "/" or "..", which is a folder and nothing in it."""
    if prefix.name in ("", ".."):
        nearest = prefix / "tokens"
        raise DataError(
            f"{prefix}: a folder given; allowed: a prefix of files in a folder; nearest: {nearest}", code="MDS411"
        )


def write_info(prefix: Path, info: DatasetInfo) -> None:
    """Publish the sidecar of the pair at `prefix`."""
    content = asdict(info)
    if not info.bad_rows:
        del content["bad_rows"], content["bad_row_examples"]
    if not info.is_chat:
        for name in _OF_CHATS:
            del content[name]
    write_json(dataset_files(prefix)[2], content, indent=2, sort_keys=True)


def read_info(prefix: Path) -> DatasetInfo:
    """Read and check the sidecar. Raises DataError when a file is missing, torn or of another format."""
    bin_path, idx_path, info_path = dataset_files(prefix)
    missing = [path.name for path in (bin_path, idx_path, info_path) if not path.is_file()]
    if missing:
        command = f"mythos-ds prepare-data INPUT --tokenizer TOKENIZER --output {prefix}"
        if prefix.is_file():
            raise DataError(
                f"{prefix}: is text, not a prepared prefix; prepare it, and give the new prefix: "
                f"mythos-ds prepare-data {prefix} --tokenizer TOKENIZER --output {prefix.with_suffix('')}",
                code="MDS411",
            )
        where = where_searched(prefix)
        raise DataError(
            f"no dataset at {prefix}: {', '.join(missing)} missing{where}; make it with: {command}", code="MDS411"
        )
    info = _parse(info_path)
    sizes = [(bin_path, info.bin_bytes), (idx_path, info.idx_bytes)]
    if info.is_chat:
        if not (mask_path := mask_file(prefix)).is_file():
            raise DamagedDatasetError(f"{mask_path} is missing, of conversations at {prefix}; prepare them again")
        sizes.append((mask_path, info.tokens))
    for path, size in sizes:
        if path.stat().st_size != size:
            given = f"{path.stat().st_size} bytes given, {size} written"
            raise DamagedDatasetError(f"{path} is damaged or of another run of prepare-data: {given}; prepare it again")
    return info


def _parse(path: Path) -> DatasetInfo:
    try:
        info: DatasetInfo = read_json(path, DatasetInfo, DataError)
    except DataError as error:
        raise DamagedDatasetError(f"{error}; this does not describe a dataset: prepare it again") from error
    if info.format != FORMAT:
        raise DamagedDatasetError(f"{path}: format {info.format} given; this version reads format {FORMAT}")
    for name, least in (("documents", 1), ("tokens", 1), ("vocab_size", 1), ("eos_id", 0)):
        if getattr(info, name) < least:
            raise DamagedDatasetError(
                f"{path}: {name}: {getattr(info, name)} given; allowed: at least {least}; prepare it again"
            )
    # Without its mask a set of conversations would be read as text, all of which counts.
    missing = [name for name in ("mask_sha256", "chat_template") if getattr(info, name) is None]
    given = [name for name in _OF_CHATS if getattr(info, name)]
    if given and missing:
        raise DamagedDatasetError(
            f"{path}: {', '.join(given)} given and no {', '.join(missing)}; conversations have both, text has none of "
            "these: prepare it again"
        )
    return info
