"""The processes of a run on this machine, started, watched and ended as a launcher does. No torch."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mythos_ds.environment import ProcessEnvironment

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""What the others have left when one has failed; they may hang in a collective."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BY_SIGNAL = 128


def run_processes(command: Sequence[str], count: int) -> int:
    """Run `command` once for each of `count` ranks, and wait for all.

    Returns 0, or the exit code of the first that failed (128 + n where signal n ended it); the others are then ended.
    SIGTERM and SIGINT are handed on to every rank.
    """
    running: list[subprocess.Popen[bytes]] = []
    with _handing_on(running):
        for variables in _environments(count):
            # A session of its own: a terminal's Ctrl-C comes once, by way of this process.
            running.append(subprocess.Popen(command, env=variables, start_new_session=True))
        try:
            while True:
                codes = [process.poll() for process in running]
                failed = [code for code in codes if code]
                if failed or None not in codes:
                    return _exit_code(failed[0]) if failed else 0
                time.sleep(_POLL_SECONDS)
        finally:
            _end(running)


def _environments(count: int) -> Iterator[dict[str, str]]:
    """The variables of each rank. Every process would else take all cores for its threads."""
    alone = ProcessEnvironment.detect({})
    threads = str(max(1, (os.cpu_count() or 1) // count))
    for rank in range(count):
        variables = {"OMP_NUM_THREADS": threads, **os.environ}
        place = ProcessEnvironment(rank, count, rank, count, alone.master_addr, alone.master_port, "python")
        place.export(variables)
        yield variables


@contextmanager
def _handing_on(running: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    former = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _exit_code(code: int) -> int:
    return code if code > 0 else _BY_SIGNAL - code


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: by SIGTERM, and then by SIGKILL."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
