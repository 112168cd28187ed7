"""Files that appear whole or not at all, whenever the process stops: text, JSON, folders."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mythos_ds.errors import CheckpointError, MythosError

_MARK = b"\xef\xbb\xbf"
_MAX_BYTES = 1 << 28
_SHOWN_CHARACTERS = 80


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, content: Any, *, indent: int = 1, sort_keys: bool = False) -> None:
    """Write JSON as `write_atomic` writes text."""
    write_atomic(path, json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n")


def read_json(path: Path, shape: Any = Any, error: type[MythosError] = CheckpointError) -> Any:
    """The content of a JSON file, of the type `shape` (a dataclass, `dict[str, int]` ...); nothing is converted.

    A dataclass takes the keys it knows; others are left out. Raises `error` with the file, and the key where one is
    wrong: for a file that is missing, no regular file, not readable, not JSON, nested beyond 200 levels, or of another
    shape.
    """
    return parse_json(read_bytes(path, error), str(path), shape, error)


def parse_json(text: str | bytes, where: str, shape: Any = Any, error: type[MythosError] = CheckpointError) -> Any:
    """As `read_json`, of text that is at hand; `where` names it in messages."""
    from pydantic import ValidationError

    try:
        return _adapter(shape).validate_json(text.removeprefix(_MARK) if isinstance(text, bytes) else text, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "json_invalid" else f", {_shortened(first['input'])} given"
        raise error(f"{where}: {f'{key}: ' if key else ''}{first['msg']}{given}") from problem


def read_bytes(path: Path, error: type[MythosError] = CheckpointError, max_bytes: int = _MAX_BYTES) -> bytes:
    """A file whole. Raises `error` where it is missing, no regular file, not readable, or larger than `max_bytes`."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path}: no regular file")
            if found.st_size > max_bytes:
                raise error(f"{path}: {found.st_size:,} bytes given; allowed: at most {max_bytes:,}")
            return file.read()
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        raise error(f"{path}: not readable ({getattr(problem, 'strerror', None) or problem})") from problem


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe without a writer is opened, and refused, at once


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def partial_path(target: Path) -> Path:
    """A new hidden name beside `target`, on the same file system, for output under construction."""
    return target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:12]}"


@contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """A fresh directory that becomes `target` in one rename when the block ends without an exception.

    Where another process has published `target` meanwhile, its directory stays and ours is dropped: callers
    write the same content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = partial_path(target)
    work.mkdir()
    try:
        yield work
        for path in work.rglob("*"):
            sync(path)
        _rename_or_drop(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename_or_drop(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    sync(target.parent)
