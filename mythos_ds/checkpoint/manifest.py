"""What makes a checkpoint directory complete: a manifest, written last, with the size and checksum of every file."""

import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.errors import CheckpointError, DamagedCheckpointError
from mythos_ds.io import open_regular, read_json, remove_leftovers, write_atomic

MANIFEST = "manifest.json"
LATEST = "latest"
STATE = "training_state.json"
TAG_PREFIX = "step_"
PARTIAL_PREFIX = ".partial_"
_CHUNK_BYTES = 1 << 22
_THREADS = 4
"""Files that a process checksums at once."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of one file; enough to notice a torn or damaged one, not against an attacker."""

    size: int
    crc32: int


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, FileRecord]


def tag_name(step: int) -> str:
    """Directory name of the checkpoint taken after `step` optimizer steps."""
    return f"{TAG_PREFIX}{step:08d}"


def tag_step(tag: Path) -> int:
    """Optimizer steps that the checkpoint in `tag` has behind it."""
    return int(tag.name.removeprefix(TAG_PREFIX))


def list_tags(directory: Path) -> list[Path]:
    """Published checkpoint directories, newest first. They may still prove incomplete."""
    if not directory.is_dir():
        return []
    tags = [path for path in directory.iterdir() if path.is_dir() and is_tag(path.name)]
    return sorted(tags, key=tag_step, reverse=True)


def is_tag(name: str) -> bool:
    """Whether a directory name is that of a published checkpoint."""
    number = name.removeprefix(TAG_PREFIX)
    return number.isdecimal() and name == tag_name(int(number))


def data_files(directory: Path) -> list[Path]:
    """Every file below `directory` that belongs into its manifest, sorted by name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != MANIFEST and not path.name.startswith("."))


def share_of(items: list[Path], rank: int, world_size: int) -> list[Path]:
    """The items that `rank` handles; all ranks together handle each one once."""
    return items[rank::world_size]


def digest(path: Path) -> FileRecord:
    """Size and checksum of a file, read in chunks. Raises CheckpointError where it cannot be read."""
    size, crc = 0, 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileRecord(size, crc)


def read_manifest(tag: Path) -> dict[str, FileRecord]:
    """Relative path -> size and checksum. Raises CheckpointError when the manifest is missing or damaged."""
    content: _Manifest = read_json(tag / MANIFEST, _Manifest)
    for name in content.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedCheckpointError(f"{tag / MANIFEST}: files: names {name!r}, which is not below the checkpoint")
    return content.files


def faults(tag: Path, rank: int = 0, world_size: int = 1, *, checksums: bool = True) -> Iterator[str]:
    """What is wrong with a checkpoint: all sizes, and of the `checksums` this rank's share. Raises CheckpointError
    where the manifest cannot be read."""
    records = read_manifest(tag)
    whole = []
    for name, record in sorted(records.items()):
        path = tag / name
        size = path.stat().st_size if path.is_file() else None
        if size == record.size:
            whole.append(path)
        else:
            there = "missing" if size is None else f"{size} bytes"
            yield f"{path}: {there}, the manifest says {record.size} bytes"
    own = share_of(whole, rank, world_size) if checksums else []
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, found in zip(own, pool.map(_readable_digest, own), strict=True):
            if isinstance(found, str):
                yield found
            elif found != records[str(path.relative_to(tag))]:
                yield f"{path}: the checksum differs from the manifest's"


def _readable_digest(path: Path) -> FileRecord | str:
    try:
        return digest(path)
    except CheckpointError as error:
        return str(error)


def verify(tag: Path, rank: int, world_size: int, *, checksums: bool = True) -> None:
    """Raises CheckpointError at the first of a checkpoint's `faults`."""
    for fault in faults(tag, rank, world_size, checksums=checksums):
        raise DamagedCheckpointError(fault)


def point_latest(directory: Path, tag: Path) -> None:
    """Let the file `latest` name `tag`, atomically."""
    write_atomic(directory / LATEST, tag.name)


def read_latest(directory: Path) -> str:
    """What `latest` says, or in words that it does not."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip() or "nothing"
    except FileNotFoundError:
        return "nothing, it is missing"
    except OSError as error:
        return f"nothing, it is not readable ({error.strerror})"


def prune(directory: Path, keep: int, newest: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints up to step `newest`, and what interrupted saves left over.

    Those of every `keep_every`-th step stay for good (0: none do). `newest` was just saved: a tag of a later step is a
    damaged one that the run went back behind.
    """
    tags = list_tags(directory)
    up_to_now = [tag for tag in tags if tag_step(tag) <= newest]
    kept = [*up_to_now[:keep], *(tag for tag in up_to_now if keep_every and tag_step(tag) % keep_every == 0)]
    for path in [*(tag for tag in tags if tag not in kept), *directory.glob(f"{PARTIAL_PREFIX}*")]:
        # Renamed first: a removal that is interrupted must not leave something that looks like a checkpoint.
        doomed = path.with_name(f"{PARTIAL_PREFIX}removed_{path.name.lstrip('.')}")
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    remove_leftovers(directory)
