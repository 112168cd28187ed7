"""The processes of a run on this machine, started, watched and ended as a launcher does. No torch."""

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from mythos_ds import ports
from mythos_ds.environment import LOOPBACK, ProcessEnvironment

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""What the others have left when one has failed; they may hang in a collective."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BY_SIGNAL = 128
TIME_LIMIT_EXIT_CODE = 124
"""That of the command `timeout`."""


def run_processes(
    command: Sequence[str],
    count: int,
    *,
    variables: Mapping[str, str] | None = None,
    logs: Path | None = None,
    limit_s: float = math.inf,
) -> int:
    """Run `command` once for each of `count` ranks, and wait for all. SIGTERM and SIGINT are handed on to every rank.

    Args:
        variables: of the environment, beside this process's own.
        logs: a folder; what a rank prints goes to `rank_<n>.log` in it.
        limit_s: seconds until all are ended.

    Returns:
        0, or the exit code of the first that failed (128 + n where signal n ended it), or 124 past the time limit; the
        others are then ended.
    """
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + limit_s
    with ExitStack() as files, _handing_on(running):
        try:
            # Held until rank 0 has it, so that nobody else takes the port between its choice and its use.
            with ports.listening(ports.ANY) as listener:
                for rank, environment in enumerate(_environments(count, variables or {}, listener)):
                    log = files.enter_context((logs / f"rank_{rank}.log").open("wb")) if logs else None
                    held = () if rank else (listener.fileno(),)
                    # A session of its own: a terminal's Ctrl-C comes once, by way of this process.
                    started = subprocess.Popen(
                        command, env=environment, start_new_session=True, stdout=log, stderr=log, pass_fds=held
                    )
                    running.append(started)
            return _wait(running, deadline)
        finally:
            _end(running)


def _wait(running: Sequence[subprocess.Popen[bytes]], deadline: float) -> int:
    """Wait until all have ended well, one has failed, or the deadline; the exit code of all together."""
    while True:
        codes = [process.poll() for process in running]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return _exit_code(failed[0]) if failed else 0
        if time.monotonic() > deadline:
            return TIME_LIMIT_EXIT_CODE
        time.sleep(_POLL_SECONDS)


def _environments(count: int, added: Mapping[str, str], listener: socket.socket) -> Iterator[dict[str, str]]:
    """The variables of each rank. Every process would else take all cores for its threads."""
    port = ports.port_of(listener)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    for rank in range(count):
        variables = {"OMP_NUM_THREADS": threads, **os.environ, **added}
        place = ProcessEnvironment(rank, count, rank, count, LOOPBACK, port, "python")
        place.export(variables)
        variables.pop(ports.HELD, None)
        if rank == 0:
            variables[ports.HELD] = str(listener.fileno())
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
