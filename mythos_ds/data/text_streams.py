"""Files as streams of bytes in bounded memory: plain or compressed, in UTF-8 or another encoding, line by line."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mythos_ds.data.index_files import open_regular_or_link
from mythos_ds.errors import DataError

BLOCK = 1 << 20
MARK = codecs.BOM_UTF8
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)
"""What reading a damaged file raises."""
_XZ_MEMORY = 256 << 20
_STARTS = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
    ".xz": (b"\xfd7zXZ\x00",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
}
_OTHER_STARTS = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"\x04\x22\x4d\x18": "lz4-compressed"}
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_OF_NAMES = ("idna", "punycode")
"""Encodings of host names, which hold no text."""
UTF_8 = "utf-8"


def open_text(path: Path, encoding: str = UTF_8) -> tuple[BinaryIO, str]:
    """A file's text as bytes, decompressed, and the encoding of these: UTF-8 in the place of one whose line ends are
    more than a byte.

    Compression is told by the content. Raises DataError where the file cannot be read, is of another kind than its
    ending says, or begins with the mark of a wide encoding that was not given.
    """
    file = open_regular_or_link(path)
    start = file.read(16)
    file.seek(0)
    found = next((ending for ending, starts in _STARTS.items() if start.startswith(starts)), None)
    named = path.suffix.lower()
    if named in _STARTS and named != found and start:
        raise DataError(f"{path}: holds no {named} data; it begins with {start[:8]!r}", code="MDS425")
    other = next((name for magic, name in _OTHER_STARTS.items() if start.startswith(magic)), None)
    if other:
        raise DataError(f"{path}: is {other}; unpack it first; allowed: {', '.join(_STARTS)}", code="MDS425")
    stream = _decompressed(path, file, found) if found else file
    return _decoded(path, stream, encoding)


def _decompressed(path: Path, file: BinaryIO, kind: str) -> BinaryIO:
    if kind == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if kind == ".bz2":
        return bz2.open(file)  # type: ignore[return-value]
    if kind == ".xz":
        return _buffered(_unpacked_xz(file))
    return _unpacked_zst(path, file)


def _unpacked_xz(file: BinaryIO) -> Iterator[bytes]:
    """The content of all streams of an .xz file; its decompressor may not take all memory."""
    rest = b""
    while True:
        while not rest:
            if not (block := file.read(BLOCK)):
                return
            rest = block.lstrip(b"\0")  # what may stand between two streams
        made = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        while not made.eof:
            rest = rest or (file.read(BLOCK) if made.needs_input else b"")
            if not rest and made.needs_input:
                raise EOFError("it ends before its end is marked")
            yield made.decompress(rest, BLOCK)
            rest = b""
        rest = made.unused_data.lstrip(b"\0")


def _unpacked_zst(path: Path, file: BinaryIO) -> BinaryIO:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(file)  # type: ignore[no-any-return]
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: .zst files need an extra: pip install 'mythos_ds[hf]'", code="MDS004") from error
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    return io.BufferedReader(stream, BLOCK)


def _decoded(path: Path, stream: BinaryIO, encoding: str) -> tuple[BinaryIO, str]:
    """The stream without the mark at its start, and in UTF-8 where its encoding is a wide one."""
    if encoding != UTF_8:
        by_line = "\n".encode(encoding) == b"\n"
        return (stream, encoding) if by_line else (_buffered(_transcoded(stream, encoding)), UTF_8)
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream, BLOCK)  # type: ignore[type-var]
    try:
        start = buffered.peek(4)[:4]
    except DAMAGES as error:  # which whoever reads it tells
        return _buffered(_raising(error)), UTF_8
    wide = next((name for mark, name in _WIDE.items() if start.startswith(mark)), None)
    if wide:
        raise DataError(
            f"{path}: is {wide} text, UTF-8 is needed: give --encoding {wide.lower()}, or convert it: "
            f"iconv -f {wide} -t UTF-8",
            code="MDS424",
        )
    if start.startswith(MARK):
        buffered.read(len(MARK))
    return buffered, UTF_8


def _raising(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""


def _transcoded(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := stream.read(BLOCK):
        yield decoder.decode(block).encode(UTF_8)
    yield decoder.decode(b"", final=True).encode(UTF_8)


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file. An error is raised again whenever it is read on: its end is not the file's."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, b""
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if self._error:
            raise self._error
        while not self._rest:
            try:
                block = next(self._blocks, None)
            except DAMAGES as error:
                self._error = error
                raise
            if block is None:
                return 0
            self._rest = block
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _buffered(blocks: Iterator[bytes]) -> BinaryIO:
    return io.BufferedReader(_Blocks(blocks), BLOCK)


def checked_encoding(name: str) -> str:
    """The usual name of a text encoding. Raises DataError for one that Python does not know."""
    try:
        found = codecs.lookup(name)
        if found.name in _OF_NAMES:
            raise LookupError(name)
        "a\n".encode(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, UnicodeError, ValueError, TypeError) as error:
        raise DataError(
            f"--encoding {name!r} given; allowed: utf-8, utf-16, latin-1, cp1252, gb18030 ...", code="MDS424"
        ) from error
    return UTF_8 if found.name == "utf-8-sig" else found.name


def lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines, from 1, with their ends, without byte order marks; None in the place of one above `max_bytes`.

    A carriage return ends a line too, with or without a line feed after it.
    """
    number = 0
    while line := file.readline(max_bytes + 1):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(BLOCK)) and not rest.endswith(b"\n"):
                pass
            number += 1
            yield number, None
            continue
        if b"\r" not in line:
            number += 1
            yield number, line.removeprefix(MARK)
            continue
        for part in line.splitlines(keepends=True):
            number += 1
            yield number, part.removeprefix(MARK)
