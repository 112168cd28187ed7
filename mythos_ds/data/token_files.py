"""What a .bin/.idx pair must look like: the checks that come before a library reads it, and those of its content."""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.dataset_info import DatasetInfo, dataset_files, mask_file
from mythos_ds.data.index_files import open_regular_or_link
from mythos_ds.errors import DamagedDatasetError, DataError
from mythos_ds.io import writing_to

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_FOUR_BYTES, _TWO_BYTES = 4, 8
_MOST_IN_TWO_BYTES = 65_500
_DTYPES: dict[int, type[np.generic]] = {_FOUR_BYTES: np.int32, _TWO_BYTES: np.uint16}
"""Codes of the two types that are written; megatron-core knows others, which hold no ids."""
_BLOCK_TOKENS = 1 << 20
_SAMPLED_BLOCKS = 32
_WHOLE_BYTES = 256 << 20
_LENGTH_BYTES, _PLACE_BYTES = 4, 8


class TokenWriter:
    """Writes documents to `prefix`.bin and `.idx` as megatron-core does, without loading it (and torch); two bytes per
    token where the vocabulary allows it."""

    def __init__(self, prefix: Path, vocab_size: int):
        self.code = _TWO_BYTES if vocab_size < _MOST_IN_TWO_BYTES else _FOUR_BYTES
        self._bin_path, self._idx_path, _ = dataset_files(prefix)
        self._file = _new(self._bin_path)
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> bytes:
        """Append tokens, and end documents of these lengths, the last with the last token; none where a document goes
        on. Returns the bytes that were written."""
        content = tokens.astype(_DTYPES[self.code]).tobytes()
        with writing_to(self._bin_path):
            self._file.write(content)
        self._lengths.append(lengths.astype(np.int32))
        return content

    def close(self) -> None:
        """Write the index."""
        with writing_to(self._bin_path):
            self._file.close()
        lengths = np.concatenate(self._lengths)
        places = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(_DTYPES[self.code]).itemsize
        count = len(lengths)
        with writing_to(self._idx_path), _new(self._idx_path) as file:
            file.write(_HEADER.pack(_MAGIC, 1, self.code, count, count + 1))
            for array in (lengths, places, np.arange(count + 1, dtype=np.int64)):
                file.write(array.tobytes())


class MaskWriter:
    """Writes `prefix`.mask: for each token 1 where it counts in the loss, else 0."""

    def __init__(self, prefix: Path):
        self._path = mask_file(prefix)
        self._file, self._digest = _new(self._path), hashlib.sha256()

    def add(self, flags: NDArray[np.uint8]) -> None:
        """Append the flags of some tokens."""
        content = flags.tobytes()
        self._digest.update(content)
        with writing_to(self._path):
            self._file.write(content)

    def close(self) -> str:
        """End the file; returns its digest."""
        with writing_to(self._path):
            self._file.close()
        return self._digest.hexdigest()


def open_ids(prefix: Path, info: DatasetInfo) -> NDArray[Any]:
    """All ids of a pair [tokens]. Raises DataError where a file is not what it should be."""
    return _mapped(dataset_files(prefix)[0], np.dtype(read_header(prefix).dtype), 0, info.tokens)


def open_lengths(prefix: Path) -> NDArray[np.int64]:
    """Tokens of each document of a pair [documents]. Raises DataError where the index is not what it should be."""
    return read_header(prefix).lengths(dataset_files(prefix)[1]).astype(np.int64)


def open_mask(prefix: Path, info: DatasetInfo) -> NDArray[np.uint8]:
    """Of each token of conversations whether it counts, uint8 [tokens]. Raises DataError where it is no plain file."""
    return _mapped(mask_file(prefix), np.dtype(np.uint8), 0, info.tokens)


def _new(path: Path) -> BinaryIO:
    """A file in the place of whatever stood there, which is neither followed nor written into."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


@dataclass(frozen=True)
class PairHeader:
    """What an .idx says first."""

    dtype: type[np.generic]
    documents: int

    def lengths(self, idx_path: Path) -> NDArray[np.int32]:
        """Tokens of each document [documents]."""
        return _mapped(idx_path, np.dtype(np.int32), _HEADER.size, self.documents)

    def starts(self, idx_path: Path) -> NDArray[np.int64]:
        """Place of each document in the .bin, in bytes [documents]."""
        place = _HEADER.size + self.documents * _LENGTH_BYTES
        return _mapped(idx_path, np.dtype(np.int64), place, self.documents)

    def ends(self, idx_path: Path) -> NDArray[np.int64]:
        """Number of the first sequence of each document, and their count [documents + 1]."""
        place = _HEADER.size + self.documents * (_LENGTH_BYTES + _PLACE_BYTES)
        return _mapped(idx_path, np.dtype(np.int64), place, self.documents + 1)


def read_header(prefix: Path) -> PairHeader:
    """The header of the .idx at `prefix`. Raises DataError where it, or the file's length, is wrong."""
    idx_path = dataset_files(prefix)[1]
    with open_regular_or_link(idx_path) as file:
        start, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise DamagedDatasetError(f"{idx_path}: not the index of a .bin file; prepare the data again")
    _, version, code, sequences, ends = _HEADER.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise DamagedDatasetError(
            f"{idx_path}: version {version}, type {code} given; allowed: version 1, types 4 and 8"
        )
    expected = _HEADER.size + sequences * (_LENGTH_BYTES + _PLACE_BYTES) + ends * _PLACE_BYTES
    if ends != sequences + 1 or expected != size:
        raise DamagedDatasetError(
            f"{idx_path} is damaged: {size:,} bytes for {sequences:,} documents; prepare the data again"
        )
    return PairHeader(_DTYPES[code], sequences)


def pair_faults(prefix: Path, info: DatasetInfo, *, full: bool) -> list[str]:
    """What is wrong with the content of a pair.

    The lengths must cover the tokens, document after document. Of the tokens, blocks spread over the file are read;
    with `full`, or where the file is small, all of it, and compared with the digest.
    """
    bin_path, idx_path, _ = dataset_files(prefix)
    try:
        header = read_header(prefix)
        with open_regular_or_link(bin_path) as file:
            size = os.fstat(file.fileno()).st_size
    except DataError as error:
        return [str(error)]
    fault = _index_fault(header, idx_path, size, info)
    if fault:
        return [f"{idx_path}: {fault}"]
    tokens = _mapped(bin_path, np.dtype(header.dtype), 0, info.tokens)
    whole = full or size <= _WHOLE_BYTES
    digest = hashlib.sha256()
    for start, block in _blocks(tokens, whole=whole):
        wrong = (block < 0) | (block >= info.vocab_size)
        if wrong.any():
            place = start + int(np.argmax(wrong))
            return [f"{_where(bin_path, header, place)}: id {tokens[place]}, of a vocabulary of {info.vocab_size}"]
        if whole:
            digest.update(np.ascontiguousarray(block).tobytes())
    if whole:
        lengths = header.lengths(idx_path)
        for start in range(0, len(lengths), _BLOCK_TOKENS):
            digest.update(lengths[start : start + _BLOCK_TOKENS].astype(np.int64).tobytes())
        if digest.hexdigest() != info.content_sha256:
            return [f"{bin_path}: its content is not what was written (content_sha256 of the .json)"]
    return _mask_faults(prefix, info, whole=whole) if info.is_chat else []


def _mask_faults(prefix: Path, info: DatasetInfo, *, whole: bool) -> list[str]:
    path, digest, counted = mask_file(prefix), hashlib.sha256(), 0
    try:
        with open_regular_or_link(path) as file:
            size = os.fstat(file.fileno()).st_size
    except DataError as error:
        return [str(error)]
    if size != info.tokens:
        return [f"{path}: {size:,} bytes for {info.tokens:,} tokens"]
    for start, block in _blocks(open_mask(prefix, info), whole=whole):
        if block.max() > 1:
            place = int(np.argmax(block > 1))
            return [f"{path}: {block[place]} for token {start + place:,}; allowed: 0 and 1"]
        if whole:
            digest.update(block.tobytes())
            counted += int(block.sum(dtype=np.int64))
    if whole and (digest.hexdigest() != info.mask_sha256 or counted != info.counted_tokens):
        return [f"{path}: its content is not what was written (mask_sha256 of the .json)"]
    return []


def _index_fault(header: PairHeader, idx_path: Path, size: int, info: DatasetInfo) -> str | None:
    """What the lengths and places of an index contradict."""
    lengths, starts, ends = header.lengths(idx_path), header.starts(idx_path), header.ends(idx_path)
    width = np.dtype(header.dtype).itemsize
    if header.documents != info.documents or size != info.tokens * width:
        return f"{header.documents:,} documents and {size // width:,} tokens; the .json says {info.documents:,} " + (
            f"and {info.tokens:,}"
        )
    place = 0
    for start in range(0, header.documents, _BLOCK_TOKENS):
        block = lengths[start : start + _BLOCK_TOKENS].astype(np.int64)
        after = place + np.cumsum(block) * width
        if block.min() < 1:
            return f"document {start + int(np.argmin(block))} has {block.min()} tokens"
        before = after - block * width
        wrong = (starts[start : start + _BLOCK_TOKENS] != before) | (
            ends[start : start + len(block)] != np.arange(start, start + len(block))
        )
        if wrong.any():
            return f"document {start + int(np.argmax(wrong))} does not begin where the one before it ends"
        place = int(after[-1])
    if place != size or (header.documents and int(ends[-1]) != header.documents):
        return f"its lengths sum to {place:,} bytes of the {size:,} of the .bin"
    return None


def _blocks(tokens: NDArray[Any], *, whole: bool) -> Iterator[tuple[int, NDArray[Any]]]:
    """Places and contents of all blocks, or of some from the first to the last."""
    count = -(-len(tokens) // _BLOCK_TOKENS)
    numbers = (
        range(count) if whole else sorted({n * (count - 1) // _SAMPLED_BLOCKS for n in range(_SAMPLED_BLOCKS + 1)})
    )
    for number in numbers:
        start = number * _BLOCK_TOKENS
        yield start, tokens[start : start + _BLOCK_TOKENS]


def _where(bin_path: Path, header: PairHeader, token: int) -> str:
    starts = header.starts(bin_path.with_name(bin_path.name.removesuffix(".bin") + ".idx"))
    place = token * np.dtype(header.dtype).itemsize
    return f"{bin_path}, document {int(np.searchsorted(starts, place, side='right')) - 1} (token {token:,})"


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    """Numbers of a file from `offset` bytes on, read when they are needed."""
    if not count:
        return np.zeros(0, dtype)
    with open_regular_or_link(path) as file:
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,))
