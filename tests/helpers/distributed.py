"""Runs a function on several gloo processes and brings back what each rank returns.

The ranks are forked from a process that has imported what they need. Start-up still costs seconds, so a test module
runs all its cases of one world size in one launch: the function takes a list of cases and returns a list of results.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.paths import ROOT

POLL_S = 0.1
PORTS = (12_000, 32_000)


class RankFailedError(AssertionError):
    """A rank raised, died or ran past its time."""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on, none of those that the system gives to connections."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def run_distributed(function: str, nprocs: int, timeout_s: float, **kwargs: Any) -> list[Any]:
    """Calls "module:function" with kwargs on `nprocs` processes with torchrun's environment; results by rank.

    Arguments and results travel as JSON. Raises RankFailedError with the first failing rank's traceback; no process
    outlives the call.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kwargs.json").write_text(json.dumps(kwargs))
        launcher = _start(function, folder, nprocs)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout_s)
        finally:
            _end(launcher)
        if launcher.returncode != 0:
            raise RankFailedError(_report(folder, nprocs, timeout_s))
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(nprocs)]


def _start(function: str, folder: Path, nprocs: int) -> subprocess.Popen:
    """A process that imports what the ranks need, once, and forks them."""
    added = {"WORLD_SIZE": nprocs, "LOCAL_WORLD_SIZE": nprocs, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    added |= {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    environment = os.environ | {key: str(value) for key, value in added.items()}
    # Private: a killed run leaves a lock in the shared folder that hangs every later one.
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "torch_extensions")
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.helpers.distributed", function, str(folder), str(nprocs)]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _report(folder: Path, nprocs: int, timeout_s: float) -> str:
    path = folder / "codes.json"
    codes = json.loads(path.read_text()) if path.is_file() else [None] * nprocs
    raised = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
    ranks = raised or [rank for rank, code in enumerate(codes) if code is None]
    what = "failed" if raised else f"did not end within {timeout_s} s"
    logs = [folder / "log", *(folder / f"log_{rank}" for rank in ranks)]
    shown = "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs if log.is_file())
    return f"ranks {ranks} {what} (exit codes {codes})\n{shown}"


def _end(process: subprocess.Popen) -> None:
    # The whole session, also where the launcher itself has ended: what a rank started may still run.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _launch(function: str, folder: Path, nprocs: int) -> int:
    """Fork the ranks and wait until all have ended, or one has failed: 0, or 1 with codes.json."""
    importlib.import_module(function.split(":")[0])
    ranks = {}
    for rank in range(nprocs):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            log = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _child(function, folder)
        ranks[pid] = rank
    codes: list[int | None] = [None] * nprocs
    while None in codes and not any(codes):
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
    if not any(codes):
        return 0
    time.sleep(POLL_S)  # others may be about to say why
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ranks[ended[0]]] = os.waitstatus_to_exitcode(ended[1])
    (folder / "codes.json").write_text(json.dumps(codes))
    return 1


def _child(function: str, folder: Path) -> NoReturn:
    module, name = function.split(":")
    try:
        result = getattr(importlib.import_module(module), name)(**json.loads((folder / "kwargs.json").read_text()))
        (folder / f"result_{os.environ['RANK']}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group that waits for the others would hang, and its threads now and then abort the
    # interpreter's own way out.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
