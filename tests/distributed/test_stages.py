"""A file of three training stages, ended anywhere and started again, is bitwise the run that went through."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve_stages
from mythos_ds.data.datasets import build_datasets
from mythos_ds.train.data_loader import dataset_arguments
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest
from tests.distributed.test_resume import checkpoint_tensors, steps_of
from tests.helpers.distributed import run_distributed
from tests.helpers.pretrain import Pretrain, metrics, run_pretrain
from tests.helpers.stages import STEPS, three_stages

WORK = "tests.distributed.stage_cases:work"
FEW = [["after_step", 5], ["on_end", 8]]
ALL = [
    ["before_step", 1],
    ["after_step", 3],
    ["on_save", 4],
    ["on_end", 4],
    ["before_step", 4],
    ["after_step", 5],
    ["on_save", 6],
    ["after_step", 7],
    ["on_save", 8],
    ["on_end", 8],
    ["before_step", 8],
    ["after_step", 10],
    ["on_end", 11],
]


def _train(root: Path, processes: int, ends: list[list[Any]]) -> tuple[Path, list[list[dict[str, Any]]]]:
    """A run that goes through, and one that is ended at `ends`, one after the other."""
    config = str(three_stages(root))
    runs = [{"folder": str(root / name), "config": config, "ends": own} for name, own in (("whole", []), ("cut", ends))]
    return root, run_distributed(WORK, processes, 900, runs=runs)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """EP 2 x ZeRO-3."""
    return _train(tmp_path_factory.mktemp("stages"), 2, FEW)


def _require_equal(root: Path) -> None:
    whole, cut = root / "whole", root / "cut"
    assert steps_of(cut) == steps_of(whole)
    assert sorted(steps_of(whole)) == list(range(1, STEPS + 1))
    losses = [[line for line in metrics(run) if any("validation" in name for name in line)] for run in (whole, cut)]
    assert losses[0] == losses[1]
    expected, found = checkpoint_tensors(whole, STEPS), checkpoint_tensors(cut, STEPS)
    assert any("exp_avg_sq" in name for name in expected)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not tensor.equal(found[name])] == []
    assert (whole / "manifest.json").read_bytes() == (cut / "manifest.json").read_bytes()
    states = [run / "checkpoints" / f"step_{STEPS:08d}" / "training_state.json" for run in (whole, cut)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_ended_in_a_stage_and_at_a_boundary_it_goes_on_bitwise(few):
    _require_equal(few[0])


def test_one_model_at_a_time_is_in_memory(few):
    assert all(alive == 0 for rank in few[1] for alive in rank[0]["alive"])
    assert [len(rank[0]["alive"]) for rank in few[1]] == [3, 3]


def test_the_data_of_every_stage_is_in_the_pinned_order(few):
    """Hashes of every sequence that was handed out, against the datasets read by number."""
    root, results = few
    manifest = RunDirectory(root / "whole").read_manifest()
    stages = resolve_stages(load_config(str(root / "stages.json")).stages, 2)
    sizes = [8, 8, 8, 8, 4, 4, 6, 8, 6, 6, 6]
    step = 0
    for number, stage in enumerate(stages):
        former = [*manifest.former_stages, None][number]
        own = manifest if former is None else RunManifest(former.pinned, former.phases)
        data = build_datasets(stage.run.config.data, **dataset_arguments(stage.run, own, 0)).train
        start = step
        while step < own.total_steps:
            first = sum(sizes[start:step])
            expected = [_hash(data[index]["tokens"]) for index in range(first, first + sizes[step])]
            for run in (0, 1):
                found = [row for rank in results for row in rank[run]["notes"][str(step)]]
                assert sorted(found) == sorted(expected), step
            step += 1
    assert step == STEPS
    hashes = [tuple(rank[0]["notes"][str(step)]) for rank in results for step in range(STEPS)]
    assert len(set(hashes)) == len(hashes)


def _hash(tokens: Any) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def test_the_manifest_and_the_checkpoint_say_what_was_read(few):
    whole = few[0] / "whole"
    content = json.loads((whole / "manifest.json").read_text())
    base, long = content["former_stages"]
    assert [stage["name"] for stage in (base, long)] == ["base", "long"]
    assert (content["stage"], content["stages_ahead"], content["total_steps"]) == ("anneal", [], STEPS)
    assert [(stage["samples"], stage["tokens"]) for stage in (base, long)] == [(32, 512), (22, 22 * 64)]
    assert content["tokens"] == 512 + 22 * 64 + 18 * 64
    assert (base["final_lr"], long["final_lr"]) == (0.02, 0.01)
    assert [entry["step"] for entry in base["validation"]] == [0, 4]
    assert [entry["step"] for entry in long["validation"]] == [8]
    assert base["pinned"]["dataset"]["content"] != long["pinned"]["dataset"]["content"]
    assert base["pinned"]["data_files"]["datasets"] == [str(few[0] / "first")]
    state = json.loads((whole / "checkpoints" / f"step_{STEPS:08d}" / "training_state.json").read_text())
    assert (state["consumed_samples"], state["consumed_tokens"]) == (32 + 22 + 18, content["tokens"])
    assert state["run"]["former_stages"] == content["former_stages"]
    assert state["config"]["training"]["schedule"] == "cosine"


def test_metrics_go_on_over_the_stages(few):
    lines = steps_of(few[0] / "whole")
    assert [lines[step]["tokens"] for step in (4, 5, 6, 7, 8, 9)] == [512, 768, 1024, 1408, 1920, 2304]
    # Warm-up of the second stage from the first one's last rate; the third begins at its own.
    assert [lines[step]["lr"] for step in (4, 5, 6, 8)] == [0.02, 0.015, 0.01, 0.01]
    assert lines[9]["lr"] < 0.01
    first = [line for line in metrics(few[0] / "whole") if any("first_loss" in name for name in line)]
    assert [(line["step"], list(line)[1]) for line in first] == [
        (4, "validation/first_loss_at_3"),
        (8, "validation/first_loss_at_3"),
    ]


@pytest.mark.slow
def test_killed_in_each_stage_and_at_each_boundary_it_goes_on_bitwise(tmp_path):
    """SIGKILL of real processes, some time after a line of the metrics or a checkpoint is there."""
    config = three_stages(tmp_path)
    commands = {name: ["--config", str(config), "--run-dir", str(tmp_path / name)] for name in ("whole", "cut")}
    run_pretrain(commands["whole"], nprocs=2, folder=tmp_path / "a").check()
    checkpoints = tmp_path / "cut" / "checkpoints"

    def has_come_to(step: int, saved: bool) -> bool:
        if saved:
            return (checkpoints / f"step_{step:08d}").is_dir()
        return any(line["step"] >= step and "loss" in line for line in metrics(tmp_path / "cut"))

    for number, place in enumerate([(3, False), (4, True), (6, False), (8, True), (10, False)]):
        with Pretrain(commands["cut"], nprocs=2, folder=tmp_path / f"b{number}") as run:
            run.wait_until(functools.partial(has_come_to, *place), 240)
            run.kill()
    run_pretrain(commands["cut"], nprocs=2, folder=tmp_path / "c").check()
    assert len((tmp_path / "cut" / "starts.jsonl").read_text().splitlines()) == 6
    _require_equal(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ended_everywhere_it_goes_on_bitwise(tmp_path, processes):
    _require_equal(_train(tmp_path, processes, ALL)[0])
