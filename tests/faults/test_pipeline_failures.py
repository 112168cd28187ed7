"""A rank of a pipeline that dies, raises or hangs: the others stop by themselves, soon, and say what went wrong."""

import signal
import time

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.pretrain import SMALL, Pretrain, metrics, small_data

RING = (
    "parallel.pp_size=2",
    "parallel.timeout_s=20",
    "model.recurrent_layers=2",
    "training.max_steps=100000",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=null",
)
SOON_S = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return small_data(tmp_path_factory.mktemp("data"))


def arguments(folder, data) -> list[str]:
    return ["--config", "tiny.json", "--run-dir", str(folder / "run"), *SMALL, *RING, *data]


def test_a_killed_rank_ends_the_others(tmp_path, data):
    with Pretrain(arguments(tmp_path, data), nprocs=4, folder=tmp_path) as run:
        run.wait_until(lambda: any("loss" in line for line in metrics(tmp_path / "run")), 240)
        run.processes[3].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        finished = run.wait(SOON_S)
    assert time.monotonic() - killed < SOON_S
    assert finished.codes[3] == -signal.SIGKILL
    assert finished.codes[:3] == [1, 1, 1]
    assert all("traceback is in" in output and "Connection" in output for output in finished.outputs[:3])


@pytest.mark.parametrize(
    ("how", "stopped"), [pytest.param("raise", [0, 1, 2, 3], marks=pytest.mark.slow), ("hang", [0, 2, 3])]
)
def test_a_rank_that_fails_in_a_step(tmp_path, data, how, stopped):
    program = (str(ROOT / "tests" / "helpers" / "failing_pretrain.py"), "1", "2", how)
    with Pretrain(arguments(tmp_path, data), nprocs=4, folder=tmp_path, program=program) as run:
        run.wait_until(lambda: any("loss" in line for line in metrics(tmp_path / "run")), 240)
        reached = time.monotonic()
        while any(run.processes[rank].poll() is None for rank in stopped) and time.monotonic() - reached < SOON_S:
            time.sleep(0.1)
        assert [run.processes[rank].poll() for rank in stopped] == [1] * len(stopped), run.output()
    outputs = [path.read_text() for path in run.logs]
    if how == "raise":
        assert "RuntimeError: this rank was told to fail" in outputs[1]
    else:
        assert any("imed out" in outputs[rank] or "timeout" in outputs[rank] for rank in stopped)
