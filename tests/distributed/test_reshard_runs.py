"""The trainer itself, from ten steps of one layout to ten more in another, against the run that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.deepspeed_format import WEIGHTS
from mythos_ds.checkpoint.portable import open_state, write_portable
from mythos_ds.io import read_json
from tests.helpers.pretrain import SMALL, metrics, run_pretrain, small_data

RING = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"
TARGETS = {
    "EP 4": (4, ["parallel.ep_size=4"]),
    "EP 1": (4, ["parallel.ep_size=1"]),
    "two processes": (2, ["parallel.ep_size=2"]),
    "a ring of two": (4, ["parallel.ep_size=2", "parallel.pp_size=2", RING]),
    "ZeRO 1": (4, ["parallel.ep_size=2", "parallel.zero_stage=1"]),
    "one process": (1, ["parallel.ep_size=1"]),
}
FIRST, LAST = "step_00000010", "step_00000020"


def _train(root: Path, data: list[str], name: str, processes: int, settings: list[str], *flags: str) -> dict[int, Any]:
    run = root / name
    arguments = ["--config", "tiny.json", "--run-dir", str(run), *flags, *SMALL, *data, "model.recurrent_layers=2"]
    arguments += ["training.max_steps=20", "checkpoint.interval=10", "checkpoint.keep=9", *settings]
    run_pretrain(arguments, nprocs=processes, folder=root / f"{name}_logs").check()
    return {line["step"]: line for line in metrics(run) if "loss" in line}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[int, Any]]:
    root = tmp_path_factory.mktemp("reshard")
    data = small_data(root)
    return root, data, _train(root, data, "whole", 4, ["parallel.ep_size=2"])


def _difference(first: Path, second: Path) -> dict[str, float]:
    """Largest relative difference of a tensor of each kind."""
    one, two = open_state(first)[0], open_state(second)[0]
    assert set(one) == set(two)
    found = {}
    for kind in one:
        assert set(one[kind].specs()) == set(two[kind].specs())
        pairs = [(one[kind].read(name), two[kind].read(name)) for name in one[kind].specs()]
        found[kind] = max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs)
    return found


def _check(uninterrupted: tuple[Path, list[str], dict[int, Any]], name: str, found: dict[int, Any]) -> None:
    root, _, expected = uninterrupted
    assert sorted(found) == list(range(11, 21))
    for step, line in found.items():
        assert abs(line["loss"] / expected[step]["loss"] - 1) <= 5e-6
        assert line["n_loops"] == expected[step]["n_loops"]
    whole, own = (root / run / "checkpoints" / LAST for run in ("whole", name))
    assert max(_difference(whole, own).values()) < 1e-4
    states = [read_json(tag / manifest.STATE) for tag in (whole, own)]
    assert states[0]["consumed_samples"] == states[1]["consumed_samples"]
    biases = [open_state(tag)[0][WEIGHTS] for tag in (whole, own)]
    for buffer in (name for name in biases[0].specs() if name.endswith(("router.bias", "loop_bias", "loop_updates"))):
        assert torch.equal(biases[0].read(buffer), biases[1].read(buffer)), buffer


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_training_goes_on_in_another_layout(name, uninterrupted):
    root, data, _ = uninterrupted
    processes, settings = TARGETS[name]
    folder = name.replace(" ", "_")
    found = _train(root, data, folder, processes, settings, "--resume", str(root / "whole" / "checkpoints" / FIRST))
    _check(uninterrupted, folder, found)


@pytest.mark.slow
def test_training_goes_on_from_a_portable_checkpoint(uninterrupted):
    root, data, _ = uninterrupted
    portable = root / "portable"
    write_portable(root / "whole" / "checkpoints" / FIRST, portable / "checkpoints")
    (portable / "manifest.json").write_bytes((root / "whole" / "manifest.json").read_bytes())
    found = _train(root, data, "from_portable", 2, ["parallel.ep_size=1"], "--resume", str(portable))
    _check(uninterrupted, "from_portable", found)
