"""Documents out of JSONL, plain text, Parquet and Hugging Face datasets, one at a time."""

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from mythos_ds.errors import DataError

FileFormat = Literal["jsonl", "text", "parquet"]
TextDocuments = Literal["file", "paragraph"]
_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_BATCH_ROWS = 1024


def find_inputs(inputs: Iterable[Path]) -> list[Path]:
    """The files themselves, and every readable file below the directories, sorted.

    Raises DataError for a missing one.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _ending(file) in _FORMATS)
            if not inside:
                raise DataError(f"{path}: no file ending in {', '.join(_FORMATS)} (or these with .gz) in it")
            found.extend(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"input {path} not found")
    return found


def read_files(
    paths: Iterable[Path],
    *,
    key: str = "text",
    file_format: FileFormat | None = None,
    text_documents: TextDocuments = "file",
) -> Iterator[str]:
    """Every document of every file in order.

    key: field of a JSON object, or column of a Parquet file, that holds the text. file_format: None goes by
    the file's ending. text_documents: a plain text file is one document, or one per paragraph (blank lines
    between). Raises DataError with file and line for what cannot be read.
    """
    for path in paths:
        chosen = file_format or _FORMATS.get(_ending(path))
        if chosen is None:
            known = ", ".join(_FORMATS)
            raise DataError(f"{path}: unknown ending; allowed: {known} (or these with .gz), or give --format")
        if chosen == "jsonl":
            yield from _read_jsonl(path, key)
        elif chosen == "parquet":
            yield from _read_parquet(path, key)
        else:
            yield from _read_text(path, text_documents)


def read_hub(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    key: str = "text",
    streaming: bool = True,
) -> Iterator[str]:
    """Documents of a Hugging Face dataset: a hub name, or a folder that `save_to_disk` wrote.

    Raises DataError when the library is not installed or the dataset cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face datasets need an extra: pip install 'mythos_ds[hf]'") from error
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows: Any = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the library raises what its readers and its network stack raise
        raise DataError(f"Hugging Face dataset {name!r} ({config or 'default'}, {split}): {error}") from error
    for number, row in enumerate(rows):
        yield _text_of(row, key, f"{name} row {number}")


def limited(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """The first `limit` documents; None for all."""
    return islice(documents, limit)


def _ending(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            yield _text_of(row, key, where)


def _text_of(row: Any, key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is needed, {type(row).__name__} given")
    if key not in row:
        raise DataError(f"{where}: no field {key!r}; allowed for --key: {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: field {key!r} is {type(row[key]).__name__}, text is needed")
    return str(row[key])


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error})") from error


def _read_text(path: Path, text_documents: TextDocuments) -> Iterator[str]:
    with _open(path) as file:
        if text_documents == "file":
            yield "".join(_lines(file, path))
            return
        paragraph: list[str] = []
        for line in _lines(file, path):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError("Parquet files need an extra: pip install 'mythos_ds[hf]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise DataError(f"{path}: no column {key!r}; allowed for --key: {', '.join(map(repr, names))}")
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[key]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({key: value}, key, f"{path} row {row}")
                    row += 1
    except ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet ({error})") from error
