"""Runs a function on several gloo processes and brings back what each rank returns.

Start-up costs seconds, so a test module runs all its cases of one world size in one launch: the function takes a list
of cases and returns a list of results.
"""

import contextlib
import importlib
import json
import os
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


class RankFailedError(AssertionError):
    """A rank raised, died or ran past its time."""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_distributed(function: str, nprocs: int, timeout_s: float, **kwargs: Any) -> list[Any]:
    """Calls "module:function" with kwargs on `nprocs` processes with torchrun's environment; results by rank.

    Arguments and results travel as JSON. Raises RankFailedError with the first failing rank's traceback; no process
    outlives the call.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kwargs.json").write_text(json.dumps(kwargs))
        port = free_port()
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(nprocs):
                processes.append(_start(function, folder, rank, nprocs, port))
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                _end(process)
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(nprocs)]


def _start(function: str, folder: Path, rank: int, nprocs: int, port: int) -> subprocess.Popen:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nprocs, "LOCAL_WORLD_SIZE": nprocs}
    added = {**launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    environment = os.environ | {key: str(value) for key, value in added.items()}
    # Private: a killed run leaves a lock in the shared folder that hangs every later one.
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "torch_extensions")
    with (folder / f"log_{rank}").open("w") as log:
        command = [sys.executable, "-m", "tests.helpers.distributed", function, str(folder)]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    time.sleep(0 if all(process.poll() == 0 for process in processes) else POLL_S)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        raise RankFailedError(_report(codes, folder, timeout_s))


def _report(codes: list[int | None], folder: Path, timeout_s: float) -> str:
    raised = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
    ranks = raised or [rank for rank, code in enumerate(codes) if code is None]
    what = "failed" if raised else f"did not end within {timeout_s} s"
    logs = "\n".join(f"--- rank {rank}\n{(folder / f'log_{rank}').read_text()[-6000:]}" for rank in ranks)
    return f"ranks {ranks} {what} (exit codes {codes})\n{logs}"


def _end(process: subprocess.Popen) -> None:
    # The whole session, also where the rank itself has ended: what it started may still run.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    _child(sys.argv[1], Path(sys.argv[2]))
