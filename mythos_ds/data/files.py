"""Outputs that appear whole or not at all."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mythos_ds.io import sync, write_atomic


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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON by way of a rename."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
