"""A stage from a file of its own is the stage of the list; a change without a stage is told with both ways out."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_resume import checkpoint_tensors, steps_of
from tests.helpers.distributed import run_distributed
from tests.helpers.mains import load_main
from tests.helpers.pretrain import metrics
from tests.helpers.stages import changed, three_stages

prepare_index = load_main("tools/prepare_index.py").main
WORK = "tests.distributed.stage_cases:work"


def _only_base(content: dict[str, Any]) -> None:
    del content["stages"]


def _only_long(content: dict[str, Any]) -> None:
    """The settings of the second stage as a file of its own."""
    entry = content.pop("stages")[1]
    for section in ("model", "training", "data"):
        content[section].update(entry[section])


def _two(content: dict[str, Any]) -> None:
    del content["stages"][2]


def _other_base(content: dict[str, Any]) -> None:
    _two(content)
    content["training"].update(seq_len=32, max_steps=3)


def _renamed(content: dict[str, Any]) -> None:
    _two(content)
    content["stages"][0]["name"] = "other"


def _wider(content: dict[str, Any]) -> None:
    _only_long(content)
    content["model"]["ffn_dim"] = 64


def _frozen(content: dict[str, Any]) -> None:
    content["stages"][2]["training"]["frozen"] = ["preludes.*"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """One process; `old` is a run without stages, from which the others go on."""
    root = tmp_path_factory.mktemp("files")
    three = three_stages(root)
    files = {
        change.__name__: str(changed(three, change.__name__, change))
        for change in (_only_base, _only_long, _two, _other_base, _renamed, _wider, _frozen)
    }
    old, new = str(root / "old"), str(root / "new")
    second = [f'data.datasets=[{{"prefix": "{root / "second"}"}}]']
    staged = {"folder": new, "config": files["_only_long"], "resume": old, "stage": "long"}
    runs: dict[str, dict[str, Any]] = {
        "list": {"folder": str(root / "list"), "config": files["_two"]},
        "old": {"folder": old, "config": files["_only_base"]},
        "without a stage": {"folder": old, "config": files["_only_long"]},
        "other data": {"folder": old, "config": files["_only_base"], "overrides": second},
        "new": {**staged, "ends": [["before_step", 4], ["after_step", 5], ["after_step", 7]]},
        "again": staged,
        "elsewhere": {**staged, "folder": str(root / "third"), "overrides": [f"data.data_dir={root / 'elsewhere'}"]},
        "without a checkpoint": {**staged, "folder": str(root / "none"), "resume": "auto"},
        "wider": {**staged, "config": files["_wider"], "folder": str(root / "wider")},
        "frozen": {"folder": str(root / "frozen"), "config": files["_frozen"]},
        "listed": {"folder": str(root / "listed"), "config": files["_two"], "resume": old},
        "had": {**staged, "folder": str(root / "had"), "resume": new},
        "appended": {"folder": old, "config": files["_two"]},
        "behind": {"folder": old, "config": files["_other_base"]},
        "renamed": {"folder": old, "config": files["_renamed"]},
        "shortened": {"folder": old, "config": files["_only_long"]},
    }
    given = [{"ends": [], **run} for run in runs.values()]
    results = run_distributed(WORK, 1, 900.0, runs=given)[0]
    return root, dict(zip(runs, results, strict=True))


def test_a_stage_of_its_own_file_is_that_of_the_list(found):
    root, results = found
    whole = ("list", "old", "new", "again", "listed", "appended", "shortened")
    assert [results[name]["error"] for name in whole] == [""] * len(whole)
    expected = checkpoint_tensors(root / "list", 8)
    for name in ("new", "listed", "old"):
        other = checkpoint_tensors(root / name, 8)
        assert [key for key, tensor in expected.items() if not tensor.equal(other[key])] == [], name
        assert steps_of(root / name) == steps_of(root / "list"), name
    before = [[line for line in metrics(root / name) if line["step"] <= 4] for name in ("new", "listed", "old")]
    assert before[0] == before[1] == before[2]


def test_the_index_of_a_stage_of_its_own_file_can_be_built_before(found, capsys):
    root, results = found
    assert results["elsewhere"]["error"] == ""
    checkpoint = root / "old" / "checkpoints" / "step_00000004"
    command = ["--config", str(root / "_only_long.json"), "--resume", str(checkpoint), "--stage", "long"]
    assert prepare_index([*command, f"data.data_dir={root / 'before'}"]) == 0
    assert "22 training samples of stage long in" in capsys.readouterr().out
    built, read = ([path.name for path in (root / name / "index").iterdir()] for name in ("before", "elsewhere"))
    assert built == read
    assert len(read) == 1


@pytest.mark.parametrize("name", ["new", "listed"])
def test_the_former_stage_is_kept_in_the_new_directory(found, name):
    root, _ = found
    content = json.loads((root / name / "manifest.json").read_text())
    (former,) = content["former_stages"]
    assert (former["name"], former["phases"][0]["end_step"]) == ({"new": None, "listed": "base"}[name], 4)
    assert former["samples"] == 32
    assert [entry["step"] for entry in former["validation"]] == [0, 4]


def test_every_start_is_kept(found):
    root, _ = found
    assert [json.loads(line)["step"] for line in (root / "new" / "starts.jsonl").read_text().splitlines()] == [
        4,
        4,
        4,
        6,
        8,
    ]
    assert "stage" not in json.loads(
        (root / "list" / "checkpoints" / "step_00000004" / "training_state.json").read_text()
    )


def test_a_change_without_a_stage_names_key_files_values_and_both_ways(found):
    root, results = found
    message = results["without a stage"]["error"]
    now, then = root / "_only_long.json", root / "old" / "config.resolved.json"
    assert f"training.seq_len: 64 in {now} now, 16 in {then} when the run was started" in message
    assert "model.rope_scaling: {" in message
    assert '"stages": [{"name": "first"}, {"name": "NAME", "training": {"max_steps": 4' in message
    assert f"--resume {root / 'old'} --run-dir NEW --stage NAME" in message
    assert "digest" not in message
    message = results["other data"]["error"]
    assert f"data.datasets: {root / 'second'} now, {root / 'first'} when the run was started" in message
    assert "--stage NAME" in message


def test_what_no_stage_may_do_is_told(found):
    root, results = found
    assert "--stage long: there is no checkpoint to go on from" in results["without a checkpoint"]["error"]
    assert "is of a run that has had a stage of that name; give another name" in results["had"]["error"]
    message = results["wider"]["error"]
    assert message.startswith(f"stage 'long' cannot go on from {root / 'old'}:")
    assert "model.ffn_dim: 64 in" in message
    assert "seq_len" not in message


def test_a_pattern_of_a_later_stage_is_told_at_the_start(found):
    root, results = found
    assert "'preludes.*' given; no parameter has such a name; did you mean 'prelude" in results["frozen"]["error"]
    assert not (root / "frozen" / "metrics.jsonl").exists()


def test_a_stage_that_is_behind_cannot_change(found):
    _, results = found
    message = results["behind"]["error"]
    assert "stages[0].training.seq_len: 32 in" in message
    assert "stages[0]: training length: 3 steps now, 4 when it was trained" in message
    assert "is behind and cannot change" in message
    assert "stages that have begun keep their names and their order" in results["renamed"]["error"]
