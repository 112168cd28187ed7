"""The JSON file beside a .bin/.idx pair: what made it, and the mark that it is complete."""

from dataclasses import asdict, dataclass
from pathlib import Path

from mythos_ds.errors import DataError
from mythos_ds.io import read_json, where_searched, write_json

FORMAT = 1


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


def dataset_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Paths of tokens, index and sidecar. Raises DataError for a prefix that no file name can begin with."""
    require_name(prefix)
    return tuple(prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx", ".json"))  # type: ignore[return-value]


def require_name(prefix: Path) -> None:
    """Raises DataError for a prefix such as "", "/" or "..", which is a folder and nothing in it."""
    if prefix.name in ("", ".."):
        nearest = prefix / "tokens"
        raise DataError(f"{prefix}: a folder given; allowed: a prefix of files in a folder; nearest: {nearest}")


def write_info(prefix: Path, info: DatasetInfo) -> None:
    """Publish the sidecar of the pair at `prefix`."""
    content = asdict(info)
    if not info.bad_rows:
        del content["bad_rows"], content["bad_row_examples"]
    write_json(dataset_files(prefix)[2], content, indent=2, sort_keys=True)


def read_info(prefix: Path) -> DatasetInfo:
    """Read and check the sidecar. Raises DataError when a file is missing, torn or of another format."""
    bin_path, idx_path, info_path = dataset_files(prefix)
    missing = [path.name for path in (bin_path, idx_path, info_path) if not path.is_file()]
    if missing:
        command = f"mythos-ds prepare-data INPUT --tokenizer TOKENIZER --output {prefix}"
        where = where_searched(prefix)
        raise DataError(f"no dataset at {prefix}: {', '.join(missing)} missing{where}; make it with: {command}")
    info = _parse(info_path)
    for path, size in ((bin_path, info.bin_bytes), (idx_path, info.idx_bytes)):
        if path.stat().st_size != size:
            given = f"{path.stat().st_size} bytes given, {size} written"
            raise DataError(f"{path} is damaged or of another run of prepare-data: {given}; prepare it again")
    return info


def _parse(path: Path) -> DatasetInfo:
    try:
        info: DatasetInfo = read_json(path, DatasetInfo, DataError)
    except DataError as error:
        raise DataError(f"{error}; this does not describe a dataset: prepare it again") from error
    if info.format != FORMAT:
        raise DataError(f"{path}: format {info.format} given; this version reads format {FORMAT}")
    for name, least in (("documents", 1), ("tokens", 1), ("vocab_size", 1), ("eos_id", 0)):
        if getattr(info, name) < least:
            raise DataError(f"{path}: {name}: {getattr(info, name)} given; allowed: at least {least}; prepare it again")
    return info
