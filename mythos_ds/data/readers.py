"""Documents out of JSON, plain text, tables, Parquet and Hugging Face datasets, one at a time, in bounded memory."""

import codecs
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mythos_ds.data.chat_rows import conversation_of
from mythos_ds.data.inputs import FileFormat, format_of
from mythos_ds.data.json_rows import OVER_LINES, array_elements, not_text, parsed, text_of
from mythos_ds.data.rows import (
    MAX_ROW_BYTES,
    BadRow,
    Conversation,
    LongText,
    Row,
    long_or_whole,
    text_pieces,
    whole_texts,
)
from mythos_ds.data.text_streams import BLOCK, DAMAGES, UTF_8, checked_encoding, lines, open_text
from mythos_ds.errors import DataError

TextDocuments = Literal["file", "paragraph"]
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_MOST_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
_WHITE_SPACE = b" \t\r\n"
_MARK_CHARACTER = "\ufeff"


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        key: field of a JSON object, or column, that holds the text; "a.b" for a field of an object in it.
        file_format: None goes by each file's ending.
        text_documents: a plain text file is one document, or one per paragraph (blank lines between).
        encoding: of everything but Parquet.
        max_row_bytes: a longer row is a bad one, and is not kept in memory. Plain text files have no limit.
        chat: rows are conversations; `key` says nothing then.
    """

    key: str = "text"
    file_format: FileFormat | None = None
    text_documents: TextDocuments = "file"
    encoding: str = UTF_8
    max_row_bytes: int = MAX_ROW_BYTES
    chat: bool = False

    def row_of(self, value: Any, where: str) -> Row:
        """What a row of named values is to be: its text, or its conversation."""
        if not self.chat:
            return text_of(value, self.key, where)
        made = conversation_of(value, where)
        too_long = isinstance(made, Conversation) and len(made.text) > self.max_row_bytes
        return BadRow(where, self.too_long) if too_long else made

    @property
    def too_long(self) -> str:
        """The reason for leaving out a longer row."""
        return f"longer than {self.max_row_bytes:,} bytes; allowed is what --max-row-bytes says"


def read_files(paths: Iterable[Path], *, key: str = "text", text_documents: TextDocuments = "file") -> Iterator[str]:
    """Every document of every file in order. Raises DataError with file and line for the first that is none."""
    return whole_texts(read_rows(paths, ReadOptions(key, text_documents=text_documents)))


def read_pieces(paths: Iterable[Path], options: ReadOptions) -> Iterator[str]:
    """As `read_files`, with long text files in pieces, for what needs no whole documents."""
    return text_pieces(read_rows(paths, options))


def read_rows(paths: Iterable[Path], options: ReadOptions) -> Iterator[Row]:
    """Every document of every file in order, and in its place what is none.

    Raises DataError for a file that cannot be opened, or is of another kind than its ending or the options say.
    """
    checked_encoding(options.encoding)
    chosen = [(path, format_of(path, options.file_format)) for path in paths]  # before the first is read
    for path, file_format in chosen:
        yield from _READERS[file_format](path, options)


def read_hub(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    options: ReadOptions = ReadOptions(),
    streaming: bool = True,
) -> Iterator[Row]:
    """Documents of a Hugging Face dataset: a hub name, or a folder that `save_to_disk` wrote; of `options`, what says
    which value of a row is read.

    Raises DataError when the library is not installed, or the dataset cannot be opened or read on.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face datasets need an extra: pip install 'mythos_ds[hf]'", code="MDS004") from error
    which = f"Hugging Face dataset {name!r} ({config or 'default'}, {split})"
    number = 0
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows: Any = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        rows = iter(rows)
    except Exception as error:  # the library raises what its readers and its network stack raise
        raise DataError(f"{which}: {_first_line(error)}", code="MDS425") from error
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the same
            raise DataError(f"{which}, row {number}: {_first_line(error)}", code="MDS425") from error
        if row is None:
            return
        yield options.row_of(row, f"{name} row {number}")
        number += 1


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def limited(rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
    """Rows up to the `limit`th document; None for all."""
    documents = 0
    for row in rows:
        yield row
        documents += not isinstance(row, BadRow)
        if documents == limit:
            return


def _read_jsonl(path: Path, options: ReadOptions) -> Iterator[Row]:
    file, encoding = open_text(path, options.encoding)
    number, first, name = 0, True, str(path)
    with file:
        try:
            for number, line in lines(file, options.max_row_bytes):
                where = f"{name} line {number}"
                if line is None:
                    yield BadRow(where, options.too_long)
                elif bare := line.strip():
                    if first and bare in OVER_LINES:
                        raise DataError(f"{path}: {OVER_LINES[bare]}", code="MDS425")
                    first = False
                    yield options.row_of(parsed(line.strip(_WHITE_SPACE), encoding, where), where)
        except DAMAGES as error:
            yield _damaged(path, f"after line {number}", error)


def _damaged(path: Path, place: str, error: Exception) -> BadRow:
    said = str(error) or type(error).__name__
    if isinstance(error, UnicodeError):
        said += "; or give another --encoding (utf-16-le and -be are those without a mark at the start)"
    return BadRow(f"{path} {place}", "the file is damaged or cut short", said, damage=True)


def _read_json(path: Path, options: ReadOptions) -> Iterator[Row]:
    """A file that begins with a bracket is one array; any other is read line by line."""
    file, encoding = open_text(path, options.encoding)
    number = 0
    with file:
        try:
            start = file.read(BLOCK)
            if not start.lstrip().startswith(b"["):
                yield from _read_jsonl(path, options)
                return
            for element in array_elements(_all_blocks(start, file), options.max_row_bytes):
                number += 1
                where = f"{path} row {number}"
                bad = element is None
                yield (
                    BadRow(where, options.too_long)
                    if bad
                    else options.row_of(parsed((element or b"").strip(), encoding, where), where)
                )
        except DAMAGES as error:
            yield _damaged(path, f"after row {number}", error)
        except ValueError as error:
            yield BadRow(f"{path} after row {number}", "not a JSON array", str(error), damage=True)


def _all_blocks(start: bytes, file: BinaryIO) -> Iterator[bytes]:
    yield start
    while block := file.read(BLOCK):
        yield block


def _read_text(path: Path, options: ReadOptions) -> Iterator[Row]:
    if options.chat:
        raise DataError(f"{path}: plain text; allowed with --chat: JSON, tables, Parquet")
    if options.text_documents == "paragraph":
        yield from _read_paragraphs(path, options)
        return
    pieces = _text_blocks(path, options)
    first = next(pieces, "")
    second = next(pieces, None) if isinstance(first, str) else None
    if isinstance(first, BadRow) or second is None:
        yield first
    else:
        yield LongText(str(path), _chained(first, second, pieces))


def _chained(first: str, second: str | BadRow, rest: Iterator[str | BadRow]) -> Iterator[str | BadRow]:
    yield first
    yield second
    yield from rest


def _text_blocks(path: Path, options: ReadOptions) -> Iterator[str | BadRow]:
    """The text in blocks, without the marks at the start of its lines; a BadRow where it goes on as something else."""
    file, encoding = open_text(path, options.encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    line, at_start = 1, True
    with file:
        try:
            more = True
            while more:
                block = file.read(BLOCK)
                more = bool(block)
                try:
                    text = decoder.decode(block, final=not more)
                except UnicodeDecodeError as error:
                    line += error.object.count(b"\n", 0, error.start)
                    yield not_text(_in_its_line(error), f"{path} line {line}")
                    return
                line += text.count("\n")
                bare = text.removeprefix(_MARK_CHARACTER) if at_start else text
                bare = bare.replace("\n" + _MARK_CHARACTER, "\n")
                at_start = text.endswith("\n") if text else at_start
                if bare:
                    yield bare
        except DAMAGES as error:
            yield _damaged(path, f"line {line}", error)


def _in_its_line(error: UnicodeDecodeError) -> UnicodeDecodeError:
    begin = error.object.rfind(b"\n", 0, error.start) + 1
    after = error.object[begin : error.end]
    return UnicodeDecodeError(error.encoding, after, error.start - begin, error.end - begin, error.reason)


def _read_paragraphs(path: Path, options: ReadOptions) -> Iterator[Row]:
    file, encoding = open_text(path, options.encoding)
    number, paragraph, size = 0, list[str](), 0
    bad: BadRow | None = None

    def whole() -> Row:
        return bad or "".join(paragraph)

    with file:
        try:
            for number, line in lines(file, options.max_row_bytes):
                size += len(line or b"")
                if line is None or size > options.max_row_bytes:
                    bad = bad or BadRow(f"{path} line {number}", options.too_long)
                    paragraph, line = [], line or b"x"
                try:
                    text = line.decode(encoding)
                except UnicodeDecodeError as error:
                    bad, text = bad or not_text(error, f"{path} line {number}"), "x"
                if text.strip():
                    if bad is None:
                        paragraph.append(text)
                    continue
                if bad or paragraph:
                    yield whole()
                paragraph, size, bad = [], 0, None
            if bad or paragraph:
                yield whole()
        except DAMAGES as error:
            yield _damaged(path, f"after line {number}", error)


def _read_table(path: Path, options: ReadOptions, file_format: Literal["csv", "tsv"]) -> Iterator[Row]:
    file, encoding = open_text(path, options.encoding)
    csv.field_size_limit(options.max_row_bytes)
    dropped: list[BadRow] = []

    def texts() -> Iterator[str]:
        for number, line in lines(file, options.max_row_bytes):
            if line is None:
                dropped.append(BadRow(f"{path} line {number}", options.too_long))
                continue
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError as error:
                dropped.append(not_text(error, f"{path} line {number}"))

    with file:
        reader = csv.reader(texts(), delimiter=_DELIMITERS[file_format], strict=True)
        try:
            header = next(reader, [])
            if options.chat:
                for name in header:
                    _check_once(path, header, name)
                yield from _table_rows(path, reader, header, options, dropped)
                return
            if options.key not in header:
                shown = ", ".join(map(repr, header[:10])) or "none"
                raise DataError(
                    f"{path}: no column {options.key!r} in its first line; allowed for --key: {shown}", code="MDS422"
                )
            _check_once(path, header, options.key)
            yield from _table_rows(path, reader, header, options, dropped)
        except csv.Error as error:
            yield BadRow(f"{path} line {reader.line_num}", "not a table's first line", str(error), damage=True)
        except DAMAGES as error:
            yield _damaged(path, f"after line {reader.line_num}", error)


def _check_once(path: Path, names: list[str], key: str) -> None:
    if names.count(key) > 1:
        raise DataError(
            f"{path}: {names.count(key)} columns {key!r}; allowed: a column that is read is there once", code="MDS422"
        )


def _table_rows(
    path: Path, reader: Any, header: list[str], options: ReadOptions, dropped: list[BadRow]
) -> Iterator[Row]:
    place = -1 if options.chat else header.index(options.key)
    while True:
        where = f"{path} line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            # A quote that nothing closes takes in all that follows it.
            yield BadRow(where, "not a row of the table", str(error), damage="unexpected end" in str(error))
            continue
        finally:
            found, dropped[:] = list(dropped), []
        yield from found
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(header):
            yield BadRow(where, f"{len(row)} columns given; its first line has {len(header)}")
        elif options.chat:
            yield options.row_of(dict(zip(header, row, strict=True)), where)
        else:
            yield long_or_whole(row[place], where)


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError("Parquet files need an extra: pip install 'mythos_ds[hf]'", code="MDS004") from error
    failures = (ArrowException, OSError, ValueError, OverflowError)
    row = 0
    try:
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK, page_checksum_verification=True)
    except failures as error:
        raise DataError(f"{path}: not readable as Parquet ({_first_line(error)})", code="MDS425") from error
    with file:
        if not options.chat:
            _check_column(path, file, options.key)
        columns = None if options.chat else [options.key]
        try:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group], columns=columns):
                    if options.chat:
                        for number, value in enumerate(batch.to_pylist(), start=row):
                            yield options.row_of(value, f"{path} row {number}")
                    else:
                        yield from _column_texts(path, batch, options, row)
                    row += batch.num_rows
        except failures as error:
            reason = "not readable as Parquet, the file is damaged or cut short"
            yield BadRow(f"{path} after row {row}", reason, _first_line(error), damage=True)


def _check_column(path: Path, file: Any, key: str) -> None:
    names = [file.schema.column(number).path for number in range(len(file.schema))]
    tops = list(file.schema_arrow.names)
    if key not in names and key not in tops:
        some = ", ".join(map(repr, dict.fromkeys([*tops, *(name for name in names if ".list." not in name)])))
        raise DataError(f"{path}: no column {key!r}; allowed for --key: {some}", code="MDS422")
    _check_once(path, tops, key.split(".")[0] if key not in tops else key)


def _rows_at_once(file: Any, group: int) -> int:
    """Rows that are some megabytes together."""
    found = file.metadata.row_group(group)
    return max(1, min(_MOST_BATCH_ROWS, _BATCH_BYTES * found.num_rows // max(1, found.total_byte_size)))


def _column_texts(path: Path, batch: Any, options: ReadOptions, first: int) -> Iterator[Row]:
    top, *inside = [options.key] if options.key in batch.schema.names else options.key.split(".")
    for number, value in enumerate(batch.column(top).to_pylist(), start=first):
        where = f"{path} row {number}"
        for name in inside:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, bytes):
            try:
                value = value.decode(options.encoding)
            except UnicodeDecodeError as error:
                yield not_text(error, where)
                continue
        if isinstance(value, str) and len(value) > options.max_row_bytes:
            yield BadRow(where, options.too_long)
        else:
            yield text_of({options.key: value}, options.key, where)


_READERS: dict[FileFormat, Callable[[Path, ReadOptions], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "text": _read_text,
    "csv": lambda path, options: _read_table(path, options, "csv"),
    "tsv": lambda path, options: _read_table(path, options, "tsv"),
    "parquet": _read_parquet,
}
