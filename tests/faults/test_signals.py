"""SIGTERM ends a run cleanly with a checkpoint; a second signal aborts at once."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.helpers.pretrain import SMALL, Pretrain, environment, metrics, small_data

LONG = "training.max_steps=100000"


def test_sigterm_to_one_rank_saves_on_all_and_the_run_resumes(tmp_path):
    run_dir = tmp_path / "run"
    command = ["--config", "tiny.json", "--run-dir", str(run_dir), *SMALL, LONG, *small_data(tmp_path)]
    stopped_at: list[int] = []
    for start, rank, number in ((1, 1, signal.SIGTERM), (2, 0, signal.SIGINT)):
        former = stopped_at[-1] if stopped_at else 0
        with Pretrain(command, nprocs=2, folder=tmp_path / f"start_{start}") as run:
            run.wait_until(partial(_has_reached, run_dir, former + 2), 240)
            run.processes[rank].send_signal(number)
            finished = run.wait(120).check()
        stopped_at.append(_last_step(run_dir))
        assert f"stopped after step {stopped_at[-1]}" in finished.outputs[0]
        assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{stopped_at[-1]:08d}"
    assert stopped_at[1] > stopped_at[0] >= 2
    starts = [json.loads(line)["step"] for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, stopped_at[0]]


def _last_step(run_dir) -> int:
    return max((line["step"] for line in metrics(run_dir)), default=0)


def _has_reached(run_dir, step: int) -> bool:
    return _last_step(run_dir) >= step


PROGRAM = """
import os, signal, sys, time
from mythos_ds.resilience import signals as interruption
interruption.SAME_REQUEST_SECONDS = {window}
with interruption.StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    time.sleep(0.2)
    os.kill(os.getpid(), {second})
    time.sleep(0.1)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
sys.exit(5)
"""


@pytest.mark.parametrize(
    ("window", "second", "code"),
    [(0.05, "signal.SIGTERM", -signal.SIGTERM), (0.05, "signal.SIGINT", -signal.SIGINT), (60, "signal.SIGINT", 5)],
)
def test_a_second_request_aborts_but_an_echo_of_the_first_does_not(window, second, code):
    program = PROGRAM.format(window=window, second=second)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60, check=False)
    assert finished.returncode == code
    assert time.monotonic() - started < 30
