"""A run that was stopped anywhere and resumed is bitwise the run that was never stopped (2 processes, EP 2, ZeRO-3)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.pretrain import SMALL, Pretrain, metrics, run_pretrain, small_data

STEPS = 8
# What a step computed; the rest of a metrics line is about time and memory.
TIMED = ("tokens_per_second", "mfu", "peak_memory_bytes")


def arguments(run_dir: Path, data: list[str], *overrides: str) -> list[str]:
    return ["--config", "tiny.json", "--run-dir", str(run_dir), *SMALL, *data, *overrides]


def steps_of(run_dir: Path) -> dict[int, dict]:
    """Everything a run noted per optimizer step, bit for bit (JSON keeps every digit of a float)."""
    lines = [line for line in metrics(run_dir) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {name: value for name, value in line.items() if name not in TIMED} for line in lines}


def tensors_of(value, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested checkpoint file by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, item in items for name, tensor in tensors_of(item, f"{prefix}/{key}").items()}


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    tag = run_dir / "checkpoints" / f"step_{step:08d}"
    return {
        f"{path.relative_to(tag)}{name}": tensor
        for path in sorted(tag.rglob("*.pt"))
        for name, tensor in tensors_of(torch.load(path, map_location="cpu", weights_only=False)).items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_pretrain(arguments(folder / "run", data, f"training.max_steps={STEPS}"), nprocs=2, folder=folder).check()
    return folder / "run"


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory, data) -> Path:
    """SIGKILL some time after the checkpoint of step 3 of 8, which was written beside training; metrics of later steps
    may already be there."""
    folder = tmp_path_factory.mktemp("killed")
    saves = ["checkpoint.interval=3", "checkpoint.asynchronous=true"]
    command = arguments(folder / "run", data, f"training.max_steps={STEPS}", *saves)
    with Pretrain(command, nprocs=2, folder=folder) as run:
        run.wait_until(lambda: (folder / "run" / "checkpoints" / "latest").is_file(), 240)
        run.kill()
    assert steps_of(folder / "run").keys() >= {1, 2, 3}
    run_pretrain(command, nprocs=2, folder=folder).check()
    return folder / "run"


def test_every_step_is_bitwise_that_of_the_uninterrupted_run(uninterrupted, killed_and_resumed):
    expected, found = steps_of(uninterrupted), steps_of(killed_and_resumed)
    assert list(found) == list(range(1, STEPS + 1))
    assert len({line["n_loops"] for line in expected.values()}) > 1
    assert found == expected


def test_it_really_resumed(killed_and_resumed):
    starts = [json.loads(line)["step"] for line in (killed_and_resumed / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert starts[1] in (3, 6)


def test_weights_moments_and_router_state_are_bitwise_equal(uninterrupted, killed_and_resumed):
    expected, found = checkpoint_tensors(uninterrupted, STEPS), checkpoint_tensors(killed_and_resumed, STEPS)
    assert found.keys() == expected.keys()
    assert any("exp_avg_sq" in name for name in expected)
    biases = [tensor for name, tensor in expected.items() if name.endswith("router.bias")]
    assert biases
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in biases)
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert differing == []


def test_validation_losses_and_text_are_equal(uninterrupted, killed_and_resumed):
    runs = (uninterrupted, killed_and_resumed)
    first, second = ([line for line in metrics(run) if "validation/loss_at_4" in line] for run in runs)
    assert first == second
    assert [line["step"] for line in first] == [0, STEPS]


def test_only_the_newest_checkpoints_are_kept(killed_and_resumed):
    names = sorted(path.name for path in (killed_and_resumed / "checkpoints").iterdir())
    assert names == ["latest", "step_00000006", "step_00000008"]


def test_a_torn_checkpoint_is_skipped_and_the_one_before_taken(killed_and_resumed, uninterrupted, data, tmp_path):
    newest = killed_and_resumed / "checkpoints" / f"step_{STEPS:08d}"
    victim = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    command = arguments(killed_and_resumed, data, f"training.max_steps={STEPS}")
    finished = run_pretrain(command, nprocs=2, folder=tmp_path).check()
    assert f"skipping checkpoint {newest.name}" in "".join(finished.outputs)
    assert json.loads((killed_and_resumed / "starts.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert steps_of(killed_and_resumed) == steps_of(uninterrupted)
    assert checkpoint_tensors(killed_and_resumed, STEPS).keys() == checkpoint_tensors(uninterrupted, STEPS).keys()


@pytest.mark.slow
def test_the_depths_of_sequences_resume(data, tmp_path):
    """Each sequence with its own depth, whose mean grows: the last steps once more, from a checkpoint."""
    growing = ["training.depth_per=sequence", "training.depth_curriculum_steps=4", "training.max_steps=6"]
    run = tmp_path / "run"
    command = arguments(run, data, *growing, "checkpoint.interval=3")
    run_pretrain(command, nprocs=2, folder=tmp_path).check()
    expected, weights = steps_of(run), checkpoint_tensors(run, 6)
    assert all(1 <= line["mean_depth"] <= line["n_loops"] for line in expected.values())
    assert len({line["mean_depth"] for line in expected.values()}) > 1
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    run_pretrain(command, nprocs=2, folder=tmp_path).check()
    starts = (run / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 3]
    assert steps_of(run) == expected
    again = checkpoint_tensors(run, 6)
    assert [name for name, value in weights.items() if not torch.equal(value, again[name])] == []


def test_a_finished_run_goes_on_with_a_new_phase(uninterrupted, data, tmp_path):
    """Comes last: it changes the run. A shorter length is refused, a longer one trains on new data."""
    shorter = run_pretrain(arguments(uninterrupted, data, "training.max_steps=5"), nprocs=2, folder=tmp_path / "a")
    assert shorter.codes == [2, 2]
    assert "".join(shorter.outputs).count("5 steps now, 8 when the run was started") == 1
    before = steps_of(uninterrupted)
    run_pretrain(arguments(uninterrupted, data, "training.max_steps=10"), nprocs=2, folder=tmp_path / "b").check()
    after = steps_of(uninterrupted)
    assert list(after) == list(range(1, 11))
    assert {step: after[step] for step in before} == before
    phases = json.loads((uninterrupted / "manifest.json").read_text())["phases"]
    assert phases == [
        {"start_step": 0, "end_step": 8, "seed": 0, "decided_at": 0},
        {"start_step": 8, "end_step": 10, "seed": 1, "decided_at": 8},
    ]
