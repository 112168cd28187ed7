"""Whole runs with a pipeline: resumed bitwise, and the proxy of the largest preset."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.test_resume import checkpoint_tensors, steps_of
from tests.helpers.pretrain import SMALL, metrics, run_pretrain, small_data

STEPS = 5
RING = (
    "parallel.pp_size=2",
    "model.recurrent_layers=2",
    "model.tie_embeddings=true",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=null",
)


def arguments(run_dir: Path, data: list[str], *overrides: str) -> list[str]:
    return ["--config", "tiny.json", "--run-dir", str(run_dir), *SMALL, *RING, *data, *overrides]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> tuple[Path, Path]:
    """The run directories of an uninterrupted run, and of what became of its first two steps when they were resumed."""
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    settings = (f"training.max_steps={STEPS}", "checkpoint.interval=2", "checkpoint.keep=3")
    run_pretrain(arguments(whole / "run", data, *settings), nprocs=4, folder=whole).check()
    shutil.copytree(whole / "run", resumed / "run")
    for step in (4, STEPS):
        shutil.rmtree(resumed / "run" / "checkpoints" / f"step_{step:08d}")
    run_pretrain(arguments(resumed / "run", data, *settings), nprocs=4, folder=resumed).check()
    return whole / "run", resumed / "run"


def test_every_step_is_bitwise_that_of_the_uninterrupted_run(runs):
    whole, resumed = map(without_times, map(steps_of, runs))
    starts = [json.loads(line)["step"] for line in (runs[1] / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 2]
    assert list(whole) == list(range(1, STEPS + 1))
    assert resumed == whole


def without_times(steps: dict[int, dict]) -> dict[int, dict]:
    return {
        step: {name: value for name, value in line.items() if name != "pipeline/idle_share"}
        for step, line in steps.items()
    }


def test_weights_moments_and_router_state_are_bitwise_equal(runs):
    whole, resumed = (checkpoint_tensors(run, STEPS) for run in runs)
    assert resumed.keys() == whole.keys()
    assert any("exp_avg_sq" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_tensors_have_the_names_of_any_other_layout(runs):
    names = set()
    for stage in (0, 1):
        folder = runs[0] / "checkpoints" / f"step_{STEPS:08d}" / f"stage_{stage}"
        (path,) = folder.glob("zero_pp_rank_0_*_model_states.pt")
        names |= set(torch.load(path, map_location="cpu", weights_only=False)["module"])
    assert {"embed.weight", "prelude.0.attn.q.weight", "recurrent.layers.1.moe.router.weight"} <= names
    assert {"recurrent.injection.log_A", "coda.0.ffn.w2.weight", "norm.weight"} <= names


def test_metrics_name_idle_time_as_measured_and_predicted(runs):
    lines = [line for line in metrics(runs[0]) if "loss" in line]
    for line in lines:
        assert 0 < line["pipeline/idle_share"] < 1
        assert 0 < line["pipeline/predicted_idle_share"] < 1
        assert line["pipeline/peak_held_visits"] == line["pipeline/predicted_peak_held_visits"]


def test_another_cut_goes_on(runs, data, tmp_path):
    """A ring's checkpoint continues without a pipeline."""
    whole = [f"training.max_steps={STEPS + 1}", "parallel.pp_size=1", f"--resume={runs[0]}"]
    run_pretrain(arguments(tmp_path / "run", data, *whole), nprocs=4, folder=tmp_path).check()
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [STEPS + 1]


@pytest.mark.slow
def test_the_proxy_of_the_largest_preset_trains(tmp_path):
    proxy = [
        "--config",
        "1t.json",
        "--proxy",
        "parallel.pp_size=2",
        "training.max_steps=3",
        "stages.anneal.training.max_steps=1",
        "monitor.sample_tokens=1",
    ]
    command = [*proxy, "--run-dir", str(tmp_path / "run"), f"data.data_dir={tmp_path}"]
    run_pretrain(command, nprocs=4, folder=tmp_path, timeout_s=400).check()
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3
    assert losses[2] < losses[0]
