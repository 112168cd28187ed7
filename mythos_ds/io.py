"""Files that appear whole or not at all, whenever the process stops: text, JSON, folders."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mythos_ds.errors import CheckpointError


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


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error


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
