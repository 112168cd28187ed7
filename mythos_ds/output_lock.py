"""One job at a time for each output: a lock file that is created exclusively, which holds on NFS and between hosts.

A lock is a whole file that is linked into place. That of a dead process is taken over: the right to replace the lock
with token X is itself a lock, named after X, so that one of several takers gets it, and one that dies on the way is
taken over in its turn.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mythos_ds.errors import OutputError
from mythos_ds.io import open_new, read_json, remove_leftovers, sync, temporary_path
from mythos_ds.log import get_logger
from mythos_ds.process_identity import ProcessIdentity

LOCK = ".mythos_ds.lock"
"""Name of the lock in a folder that is written."""

_TRIES = 100
_PAUSE_SECONDS = 0.02
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_TOKEN = re.compile(r"[0-9a-f]{16}")
_logger = get_logger(__name__)


@dataclass(frozen=True)
class LockRecord:
    """What a lock says of its holder."""

    process: ProcessIdentity
    started: str
    command: str
    token: str

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host} since {self.started} ({self.command})"


@contextmanager
def locked_output(target: Path, command: str, *, folder: bool = True, break_lock: bool = False) -> Iterator[None]:
    """Keep other jobs off `target` while the block runs, and remove what dead ones left half written in its folder.

    folder: whether `target` is a folder, which is made; else it is the beginning of the names of files. break_lock:
    take a lock whose process may be alive on another host. SIGTERM and SIGHUP end the block as an exception does.

    Raises OutputError, before anything is written, where another process holds the lock.
    """
    record = LockRecord(ProcessIdentity.own(), _now(), command, secrets.token_hex(8))
    with _ended_by_signals():
        path, made = _acquire(target, folder, record, break_lock)
        try:
            remove_leftovers(path.parent, alone=folder)
            yield
        finally:
            remove_leftovers(path.parent, alone=folder)
            _release(path, record)
            for each in made:  # nothing was written there
                with suppress(OSError):
                    each.rmdir()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _acquire(target: Path, folder: bool, record: LockRecord, break_lock: bool) -> tuple[Path, list[Path]]:
    """The lock, once it is ours, and the folders that were made for it, the innermost first."""
    try:
        place = target.resolve()
        digest = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]
        path = place / LOCK if folder else place.parent / f".mythos_ds-{digest}.lock"
        made: list[Path] = []
        for _ in range(_TRIES):
            made = _make_folders(path.parent) or made
            with suppress(FileNotFoundError):  # another job has removed the folder that it had made
                _take(path, record, target, break_lock)
                return path, made
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead back to themselves
        raise OutputError(
            f"{target}: cannot be written ({getattr(error, 'strerror', None) or error})", code="MDS602"
        ) from error
    raise OutputError(
        f"{target}: cannot be written ({path.parent} takes no files, or is removed again and again)", code="MDS602"
    )


def _make_folders(folder: Path) -> list[Path]:
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, record: LockRecord, target: Path, break_lock: bool) -> None:
    """Let `path` hold `record`: create it, or replace what a dead process left there."""
    for _ in range(_TRIES):
        if _created(path, record):
            return
        found = _read(path)
        if isinstance(found, LockRecord):
            if found.process.is_dead():
                if _taken_over(path, found, record, target, break_lock):
                    return
            elif break_lock and not found.process.is_alive():
                _logger.warning("%s: the lock of %s is broken", target, found)
                _put(path, record)
                return
            else:
                raise OutputError(_refusal(target, found), code="MDS603")
        elif found is not None and break_lock:
            _put(path, record)
            return
        time.sleep(_PAUSE_SECONDS)  # where links are unknown, one that is just being created is not readable
    raise OutputError(
        f"{target}: its lock {path.name} is not readable; if no job writes there, give --break-lock", code="MDS604"
    )


def _taken_over(path: Path, found: LockRecord, record: LockRecord, target: Path, break_lock: bool) -> bool:
    """Replace the lock of a dead process. Whether that was done: another may have been quicker."""
    claim = path.with_name(f"{path.name}.{found.token}")
    _take(claim, record, target, break_lock)
    try:
        if _read(path) != found:
            return False
        _put(path, record)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _refusal(target: Path, found: LockRecord) -> str:
    if found.process.is_alive():
        todo = "wait for it or end it, or choose another output"
    else:
        todo = "choose another output, or, if that process has ended, give --break-lock"
    return f"{target}: is being written by {found}; {todo}"


def _created(path: Path, record: LockRecord) -> bool:
    temporary = _written(path, record)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            return temporary.stat().st_nlink > 1  # made, though the answer of the server was lost
    finally:
        temporary.unlink(missing_ok=True)
    try:
        with open_new(path) as file:
            file.write(_text(record))
            return True
    except FileExistsError:
        return False


def _put(path: Path, record: LockRecord) -> None:
    _written(path, record).replace(path)


def _written(path: Path, record: LockRecord) -> Path:
    temporary = temporary_path(path.parent)
    try:
        with open_new(temporary) as file:
            file.write(_text(record))
        return temporary
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _text(record: LockRecord) -> bytes:
    return (json.dumps(asdict(record), indent=1) + "\n").encode()


def _read(path: Path) -> LockRecord | str | None:
    """What is in a lock; in words why it is not readable; None where there is none."""
    try:
        record: LockRecord = read_json(path, LockRecord, OutputError)
    except OutputError as error:
        return str(error) if os.path.lexists(path) else None
    return record if _TOKEN.fullmatch(record.token) else f"{path}: no lock"


def _release(path: Path, record: LockRecord) -> None:
    """Remove the lock, if it is still ours, and what takers that died left beside it."""
    if _read(path) != record:
        return
    for claim in path.parent.glob(f"{path.name}.*"):
        found = _read(claim)
        if isinstance(found, LockRecord) and not found.process.is_alive():
            claim.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):
        sync(path.parent)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let the signals that ask a process to end raise SystemExit, so that its locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    try:
        for each in signals:
            signal.signal(each, end)
        yield
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
