"""Finished parts of a preparation: tokens in one file, found again by the digest of the text they were made from."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.dataset_info import require_name
from mythos_ds.data.encoding import TOKEN_DTYPE, Batch, Encoded
from mythos_ds.data.index_files import open_regular
from mythos_ds.errors import DataError
from mythos_ds.io import parse_json, real_folder, remove_at_once, writing_to

_TOKENS, _JOURNAL = "tokens", "parts.jsonl"
_FORMAT = 1
_MAX_RECORD_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """Where the tokens of some documents lie, or of a piece of a long one.

    Attributes:
        key: digest of the texts, and of what else decides the tokens.
        at: where its tokens begin in the file, counted in tokens; after them come the lengths.
        tokens, lengths: how many.
        starts, ends: as in `Batch`.
        sha256: of tokens and lengths.
    """

    key: str
    at: int
    tokens: int
    lengths: int
    starts: bool
    ends: bool
    text_bytes: int
    skipped: int
    sha256: str


def unfinished_folder(prefix: Path) -> Path:
    """The hidden folder beside an output that is being prepared. Raises DataError for a prefix without a name."""
    require_name(prefix)
    return prefix.with_name(f".{prefix.name}.unfinished")


class PartStore:
    """The hidden folder beside an output that keeps what is finished until the output is published."""

    def __init__(self, prefix: Path, tokenizer_sha256: str, chat_template: str | None = None):
        self.folder, self._prefix = unfinished_folder(prefix), prefix
        self._salt = f"{_FORMAT}:{tokenizer_sha256}" + ("" if chat_template is None else f":chat:{chat_template}")
        real_folder(self.folder)
        self._parts: dict[str, Part] = {}
        self._mapped: mmap.mmap | None = None
        self._path, self._journal = self.folder / _TOKENS, self.folder / _JOURNAL
        self._read()
        if not self._parts:  # of what lies there nothing is written into
            for path in (self._journal, self._path):
                path.unlink(missing_ok=True)
        self.found = len(self._parts)
        self._end = max((part.at + part.tokens + part.lengths for part in self._parts.values()), default=0)

    def _read(self) -> None:
        """Parts of an earlier run whose tokens are whole; what follows the first that is not is written anew."""
        if not self._journal.is_file() or not self._path.is_file():
            return
        with open_regular(self._journal) as file:
            while line := file.readline(_MAX_RECORD_BYTES):
                try:
                    part: Part = parse_json(line, str(self._journal), Part, DataError)
                except DataError:
                    return
                if min(part.at, part.tokens, part.lengths) < 0:
                    return
                self._parts[part.key] = part

    def key(self, batches: Iterable[Batch]) -> str:
        """The digest by which a part is found again."""
        digest = hashlib.sha256(self._salt.encode("utf-8"))
        for batch in batches:
            sizes = " ".join(map(str, map(len, batch.texts)))
            digest.update(f"{batch.starts} {batch.ends} {sizes}:".encode())
            digest.update("".join(batch.texts).encode("utf-16-le", "surrogatepass"))
        return digest.hexdigest()

    def known(self, key: str) -> Part | None:
        """A finished part, once its tokens have been compared with their digest; None where there is none."""
        part = self._parts.get(key)
        if part is None or hashlib.sha256(self._content(part)).hexdigest() != part.sha256:
            return None
        return part

    def _content(self, part: Part) -> bytes:
        width = np.dtype(TOKEN_DTYPE).itemsize
        with open_regular(self._path) as file:
            file.seek(part.at * width)
            return file.read((part.tokens + part.lengths) * width)

    def add(self, key: str, batches: list[Batch], results: list[Encoded]) -> Part:
        """Append the tokens of a part, and remember it, unless rows of it were refused, to be told again."""
        width = np.dtype(TOKEN_DTYPE).itemsize
        lengths = np.concatenate([each.lengths for each in results])
        digest = hashlib.sha256()
        with writing_to(self._path), _open_for_writing(self._path) as file:
            file.seek(self._end * width)
            for array in (*(each.tokens for each in results), lengths):
                content = array.tobytes()
                file.write(content)
                digest.update(content)
        tokens = sum(len(each.tokens) for each in results)
        part = Part(
            key=key,
            at=self._end,
            tokens=tokens,
            lengths=len(lengths),
            starts=batches[0].starts,
            ends=batches[-1].ends,
            text_bytes=sum(each.text_bytes for each in results),
            skipped=sum(each.skipped for each in results),
            sha256=digest.hexdigest(),
        )
        if not any(each.refused for each in results):
            with writing_to(self._journal), _open_for_writing(self._journal, os.O_APPEND) as file:
                file.write(json.dumps(asdict(part)).encode() + b"\n")
            self._parts[key] = part
        self._end += tokens + len(lengths)
        return part

    def tokens(self) -> NDArray[np.int32]:
        """All that is in the file."""
        with open_regular(self._path) as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._mapped, dtype=TOKEN_DTYPE)

    def forget_read(self) -> None:
        """Give back the memory of what was read of `tokens` so far."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def lengths(self, part: Part) -> NDArray[np.int64]:
        """Tokens of each text of a part."""
        content = np.frombuffer(self._content(part), dtype=TOKEN_DTYPE)
        return content[part.tokens :].astype(np.int64)

    @property
    def is_of_use(self) -> bool:
        """Whether there is something that a later run can take."""
        return any(part.tokens for part in self._parts.values())

    def keep_or_remove(self) -> None:
        """Remove the folder where nothing in it is of use to a later run."""
        if not self.is_of_use:
            self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        remove_at_once(self.folder, self._prefix)


def _open_for_writing(path: Path, more: int = 0) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | more, 0o644), "wb")
