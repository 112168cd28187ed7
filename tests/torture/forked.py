"""Jobs in processes that are forked from this one, which has torch imported already, and their ends."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_LIMIT_SECONDS = 120


@dataclass
class Child:
    """A started job."""

    pid: int
    log: Path
    started: float

    def wait(self) -> int:
        """The exit code, negative for a signal. Kills what does not end; its code is then -9."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - self.started > _LIMIT_SECONDS:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.001)

    def kill_after(self, seconds: float) -> int:
        """SIGKILL so long after the start; the exit code, which is another where it ended before."""
        while time.monotonic() - self.started < seconds:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text(errors="replace")


def start(work: Callable[[], int], log: Path, *, killed_at: int | None = None, changes_in: Path | None = None) -> Child:
    """Fork a process that does `work`. killed_at: it ends by SIGKILL just before so many changes of files in
    `changes_in`; the number of changes is written to the end of the log of one that is not killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    if pid := os.fork():
        return Child(pid, log, started)
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # a test may have taken them
        os.setsid()
        count = _Changes(changes_in, killed_at) if changes_in is not None else None
        code = work()
        if count is not None:
            os.write(descriptor, f"\nchanges {count.done}\n".encode())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 70
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Changes:
    """Counts what this process does to files of a folder, and ends it at a given number."""

    def __init__(self, folder: Path, killed_at: int | None):
        self.folder, self.killed_at, self.done = str(folder), killed_at, 0
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
        if not (opened or event in _CHANGES) or self.folder not in str(arguments[:2]):
            return
        if self.done == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1
