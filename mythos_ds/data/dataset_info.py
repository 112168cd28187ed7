"""The JSON file beside a .bin/.idx pair: what made it, and the mark that it is complete."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mythos_ds.errors import DataError
from mythos_ds.io import write_json

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


def dataset_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Paths of tokens, index and sidecar."""
    return tuple(prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx", ".json"))  # type: ignore[return-value]


def write_info(prefix: Path, info: DatasetInfo) -> None:
    """Publish the sidecar of the pair at `prefix`."""
    write_json(dataset_files(prefix)[2], asdict(info), indent=2, sort_keys=True)


def read_info(prefix: Path) -> DatasetInfo:
    """Read and check the sidecar. Raises DataError when a file is missing, torn or of another format."""
    bin_path, idx_path, info_path = dataset_files(prefix)
    missing = [path.name for path in (bin_path, idx_path, info_path) if not path.is_file()]
    if missing:
        command = f"mythos-ds prepare-data INPUT --tokenizer TOKENIZER --output {prefix}"
        raise DataError(f"no dataset at {prefix}: {', '.join(missing)} missing; make it with: {command}")
    info = _parse(info_path)
    for path, size in ((bin_path, info.bin_bytes), (idx_path, info.idx_bytes)):
        if path.stat().st_size != size:
            given = f"{path.stat().st_size} bytes given, {size} written"
            raise DataError(f"{path} is damaged or of another run of prepare-data: {given}; prepare it again")
    return info


def _parse(path: Path) -> DatasetInfo:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["sources"] = tuple(values["sources"])
        known = {field.name for field in fields(DatasetInfo)}
        info = DatasetInfo(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} does not describe a dataset: {error}; prepare it again") from error
    if info.format != FORMAT:
        raise DataError(f"{path}: format {info.format} given; this version reads format {FORMAT}")
    return info
