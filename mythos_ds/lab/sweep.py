"""Runs many RunSpecs, a process each, several at once; finished ones are read, not repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mythos_ds.errors import LabError
from mythos_ds.io import write_atomic
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.worker import RESULT, SPEC

Result = dict[str, Any]

_POLL_SECONDS = 0.2
_STOP_SECONDS = 30.0
_SHOWN_LINES = 15


def run_folder(output: Path, spec: RunSpec) -> Path:
    """Where a run keeps what it makes."""
    return output / "runs" / spec.key


def run_all(specs: Mapping[Any, RunSpec], output: Path, *, jobs: int, limit_s: float) -> dict[Any, Result]:
    """The results by the same keys, with the mean recurrence as `trained_depth`.

    At most `jobs` processes at once, `limit_s` seconds each. Ctrl-C stops them, and they save where they are; the same
    call goes on from there. Raises LabError for a run that fails or takes too long, with the end of its log.
    """
    waiting = {spec.key: spec for spec in specs.values() if _result(run_folder(output, spec)) is None}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    with _progress(len(waiting)) as advance:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    key, spec = waiting.popitem()
                    running[key] = (start_run(run_folder(output, spec), spec), time.monotonic() + limit_s)
                for key, (process, deadline) in list(running.items()):
                    if process.poll() is None and time.monotonic() < deadline:
                        continue
                    folder = output / "runs" / key
                    if process.returncode != 0 or _result(folder) is None:
                        raise LabError(_failure(folder, process.returncode, limit_s), code="MDS901")
                    del running[key]
                    advance()
                time.sleep(_POLL_SECONDS)
        finally:
            _stop([process for process, _ in running.values()])
    results = {}
    for key, spec in specs.items():
        result = _result(run_folder(output, spec))
        assert result is not None, "every run has finished"
        results[key] = {**result, "trained_depth": spec.config["model"]["mean_recurrence"]}
    return results


def _result(folder: Path) -> Result | None:
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def start_run(folder: Path, spec: RunSpec) -> subprocess.Popen[bytes]:
    """A process that runs `spec` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SPEC, spec.to_json())
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", spec.worker, str(folder)]
        # A session of its own: Ctrl-C reaches the sweep, which then stops the runs in order.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(folder: Path, code: int | None, limit_s: float) -> str:
    why = f"was still running after {limit_s:.0f} s" if code is None else f"ended with exit code {code}"
    tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join([f"{folder}: the run {why}; the end of its log.txt:", *tail])


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("runs", total=total)
        yield lambda: progress.advance(task)
