"""Whole runs that start from weights: a run's own, killed at the start, gone on with, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.checkpoint.manifest import STATE
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.conversion.merge import merge
from mythos_ds.conversion.starting_weights import open_starting_weights
from mythos_ds.io import read_json
from tests.helpers.pretrain import SMALL, Pretrain, metrics, run_pretrain, small_data

PROCESSES = 2
TAG = "checkpoints/step_00000002"
LOSS = "validation/loss_at_4"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["--config", "tiny.json", "--run-dir", str(folder / "first"), *SMALL, *data]
    run_pretrain([*arguments, "training.max_steps=2", "training.warmup_steps=1"], nprocs=1, folder=folder).check()
    return folder / "first"


@pytest.fixture
def config(tmp_path, data) -> Path:
    """A run file without a model section."""
    settings = [*SMALL, *data, "training.max_steps=3", "training.lr=1e-3", "training.depth_distribution=poisson"]
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, name = key.split(".")
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        if section != "model":
            sections.setdefault(section, {})[name] = given
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sections))
    return path


def losses(run_dir: Path) -> list[float]:
    """The validation losses at the mean loop count, in the order in which they were measured."""
    return [line[LOSS] for line in metrics(run_dir) if LOSS in line]


def test_a_run_starts_from_another_run(trained, config, tmp_path):
    run = tmp_path / "second"
    arguments = ["--config", str(config), "--run-dir", str(run)]
    start = [*arguments, f"training.init_from={trained}"]
    with Pretrain(start, nprocs=PROCESSES, folder=tmp_path) as killed:
        killed.wait_until((run / "manifest.json").is_file, 120)
    assert not (run / "checkpoints").exists()
    run_pretrain(start, nprocs=PROCESSES, folder=tmp_path).check()
    assert losses(run)[0] == pytest.approx(losses(trained)[-1], rel=1e-5)

    recorded = read_json(run / "manifest.json")["pinned"]["init_from"]
    assert (recorded["name"], recorded["kind"], len(recorded["sha256"])) == ("first", "checkpoint", 64)
    tag = run / "checkpoints/step_00000003"
    state = read_json(tag / STATE)
    assert state["init_from"] == recorded
    assert state["config"]["model"]["dim"] == 32
    merge(tag, tmp_path / "merged")
    assert read_json(tmp_path / "merged/config.json")["facts"]["init_from"] == recorded

    other = run_pretrain([*arguments, "training.init_from=tiny", "model.dim=128"], nprocs=1, folder=tmp_path)
    assert other.codes == [2]
    assert "training.init_from: 'tiny' now, 'first' at the run's start" in other.outputs[0]
    # It goes on without the weights that it came from.
    moved = trained.with_name("moved")
    trained.rename(moved)
    try:
        model = [f"model.{key}={json.dumps(value)}" for key, value in state["config"]["model"].items()]
        without = [*arguments, *(setting for setting in model if not setting.endswith("=null"))]
        run_pretrain([*without, "training.max_steps=4"], nprocs=PROCESSES, folder=tmp_path).check()
    finally:
        moved.rename(trained)
    assert (run / "checkpoints/step_00000004").is_dir()


def test_checkpoints_without_their_runs_manifest(trained, config, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(trained / "checkpoints", copied)
    run = resolve(load_config(str(config), [f"training.init_from={copied}"]).config, 1)
    assert run.config.model.dim == 32
    assert open_starting_weights(run, 0).identity["kind"] == "checkpoint"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_resuming_from_a_model_says_what_to_do(what, trained, config, tmp_path):
    model = tmp_path / "model"
    merge(trained / TAG, model)
    given = model if what == "folder" else model / "model.safetensors"
    command = ["--config", "tiny.json", "--run-dir", str(tmp_path / "run"), *SMALL, "--resume", str(given)]
    ended = run_pretrain(command, nprocs=1, folder=tmp_path)
    assert ended.codes == [2]
    assert f"training.init_from={given}" in ended.outputs[0]
