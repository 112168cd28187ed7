"""Files that appear whole or not at all, whenever the process stops: text, JSON, folders."""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from mythos_ds.errors import CheckpointError, MythosError, OutputError
from mythos_ds.process_identity import runs, signature

_MARK = b"\xef\xbb\xbf"
_MAX_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 22
_SHOWN_CHARACTERS = 80
_LONG_NAME_BYTES = 120
_PARTIAL = re.compile(r"([0-9a-f]{8}-\d+-\d+)-[0-9a-f]{16}")
_TEMPORARY = re.compile(r"\.mythos_ds-([0-9a-f]{8}-\d+-\d+)-[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class FileChecksum:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path`, in one rename, when the block ends without an exception; else the former stays.

    A link at `path` is replaced, not followed. Raises OutputError with the name where the disk does not take it.
    """
    temporary = temporary_path(path.parent)
    try:
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_new(temporary) as file:
                yield file
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Errors of the disk become OutputError with the name of the file that is being written, `path`; those with the
    name of a file elsewhere, which is being read, stay."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent not in (path.parent, path.parent.parent):
            raise
        kept = "; what was there before is as it was" if path.exists() else ""
        raise OutputError(f"{path}: not written ({error.strerror or error}){kept}", code="MDS602") from error


@contextmanager
def open_new(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there before, created without following a link, and forced to disk at the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content as `new_file` writes it."""
    with source.open("rb") as opened, new_file(target) as file:
        shutil.copyfileobj(opened, file)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder as `copy_file` does, and those of its folders."""
    real_folder(target)
    for path in sorted(source.iterdir()):
        if path.is_dir() and not path.is_symlink():
            copy_folder(path, target / path.name)
        elif path.is_file():
            copy_file(path, target / path.name)


def real_folder(path: Path) -> Path:
    """Make a folder in an output. Raises OutputError for a link there, through which files would get elsewhere."""
    if path.is_symlink():
        raise OutputError(f"{path}: is a link; allowed: a folder, or nothing", code="MDS602")
    path.mkdir(parents=True, exist_ok=True)
    return path


def temporary_path(folder: Path) -> Path:
    """A new hidden name, which tells whose it is and cannot be foreseen."""
    return folder / f".mythos_ds-{signature()}-{secrets.token_hex(8)}.tmp"


def remove_leftovers(folder: Path, *, alone: bool = False) -> None:
    """Remove temporary files that dead processes left in `folder`; where this job is `alone` to write there, also those
    of other hosts' processes."""
    for path in folder.glob(".mythos_ds-*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        running = runs(found[1]) if found else True
        if running is False or (running is None and alone):
            with suppress(OSError):
                path.unlink()


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
        raise error(f"{where}: {f'{key}: ' if key else ''}{first['msg']}{given}", code="MDS006") from problem


def read_bytes(path: Path, error: type[MythosError] = CheckpointError, max_bytes: int = _MAX_BYTES) -> bytes:
    """A file whole. Raises `error` where it is missing, no regular file, not readable, or larger than `max_bytes`."""
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise error(f"{path}: {size:,} bytes given; allowed: at most {max_bytes:,}", code="MDS006")
        return file.read()


@contextmanager
def open_regular(path: Path, error: type[MythosError] = CheckpointError) -> Iterator[BinaryIO]:
    """A file to be read. Raises `error` where it is missing, no regular file, or not readable."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: no regular file", code="MDS006")
            yield file
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{looked_for(path)}: not readable ({reason})", code="MDS006") from problem


def checksum_of(file: BinaryIO) -> FileChecksum:
    """Size and SHA-256 of what an open file holds from here on, read in chunks."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return FileChecksum(size, digest.hexdigest())


def looked_for(path: Path | str) -> str:
    """A path as it was given, and where it was looked for: for a message that it is not there."""
    return f"{path}{where_searched(path)}"


def where_searched(path: Path | str) -> str:
    """ " (looked for in FOLDER)" of a relative path, the working directory; nothing of an absolute one."""
    if os.path.isabs(path):
        return ""
    try:
        return f" (looked for in {os.getcwd()})"
    except OSError:
        return " (looked for in a folder that is gone)"


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
    return target.parent / f"{_partial_start(target)}{signature()}-{secrets.token_hex(8)}"


def _partial_start(target: Path) -> str:
    """How hidden names beside `target` begin; they fit where its own does."""
    name = os.fsencode(target.name)
    shown = target.name if len(name) <= _LONG_NAME_BYTES else hashlib.sha256(name).hexdigest()
    return f".{shown}.partial-"


def remove_at_once(folder: Path, target: Path) -> None:
    """Remove a hidden folder of ours beside `target`; one that is removed in part only is seen to be that."""
    doomed = partial_path(target)
    with suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_partials(target: Path) -> None:
    """Remove what dead processes of this host left of output under construction at `target`."""
    start = _partial_start(target)
    for path in target.parent.iterdir():
        found = _PARTIAL.fullmatch(path.name.removeprefix(start)) if path.name.startswith(start) else None
        if found and runs(found[1]) is False:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """A fresh directory that becomes `target` in one rename when the block ends without an exception.

    Where another process has published `target` meanwhile, its directory stays and ours is dropped: callers
    write the same content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(target)
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
