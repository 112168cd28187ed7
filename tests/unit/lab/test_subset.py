"""Parts of studies: which runs a word names, what a wrong one is told, and that full results are not written over."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.errors import LabError
from mythos_ds.lab.studies.registry import STUDIES
from mythos_ds.lab.study import Report, Results
from mythos_ds.lab.subset import select, subset_report
from mythos_ds.lab.trained_models import Folders
from tools import lab


def chosen(study: str, arms: list[str] | None = None, seeds: list[int] | None = None) -> set[tuple[str, int]]:
    """The keys of the runs that are selected at the laptop's scale."""
    return set(select(STUDIES[study].runs("cpu", "data"), arms, seeds))


def test_words_name_arms_at_every_size_one_size_or_all_of_a_size() -> None:
    every = chosen("khop")
    assert chosen("khop", ["looped"], [0]) == {("S8 R6/looped", 0), ("S16 R8/looped", 0)}
    assert chosen("khop", ["S8 R6/looped", "act"], [1]) == {("S8 R6/looped", 1), ("S8 R6/act", 1)}
    assert chosen("khop", ["S16 R8"]) == {key for key in every if key[0].startswith("S16 R8/")}
    assert chosen("khop", None, [2]) == {key for key in every if key[1] == 2}
    assert chosen("width", ["0.002"]) == {("128/0.002", 0), ("512/0.002", 0)}
    assert chosen("khop", None, [0, 1, 2]) == every


def test_unknown_names_are_one_error_with_the_nearest() -> None:
    with pytest.raises(LabError) as caught:
        chosen("khop", ["loped", "fixed"], [0, 7])
    arms, seeds = str(caught.value).split("\n")
    assert arms.startswith("--arms: given loped; allowed: looped, equal_flops, ")
    assert arms.endswith("did you mean 'looped'?")
    assert seeds == "--seeds: given 7; allowed: 0, 1, 2; nearest: 2"
    with pytest.raises(LabError, match="do not have the given seeds"):
        chosen("retrofit", ["untrained"], [1])


def made_up(specs: dict[str, Any], *_: Any, **__: Any) -> dict[Any, dict[str, Any]]:
    """Results in place of training."""
    result = {"parameters": 1234, "seconds": 6.0, "accuracy": {"1": [0.5, 0.25], "12": [1.0, 0.5]}, "curve": [[1, 2.0]]}
    return {key: {**result, "trained_depth": 6} for key in specs}


def test_a_subset_is_written_beside_the_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "run_all", made_up)
    places = ["--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), "--scale", "smoke"]
    lab.work(lab.parser().parse_args(["khop", *places, "--arms", "looped", "--seeds", "0"]))
    folder = tmp_path / "runs" / "subsets" / "khop-smoke"
    assert capsys.readouterr().out == f"{folder / 'results.md'}\n"
    page = (folder / "results.md").read_text()
    assert "* subset: 1 of the study's 3 runs; its own tables need all of them" in page
    assert "* command: `mythos-ds lab khop --scale smoke --arms looped --seeds 0`" in page
    assert "| S4 R3/looped | 0 | 0.3750 | 0.7500 |" in page
    numbers = json.loads((folder / "results.json").read_text())["numbers"]
    assert numbers["S4 R3/looped, seed 0"]["accuracy"] == {"1": [0.5, 0.25], "12": [1.0, 0.5]}
    assert not (tmp_path / "docs").exists()
    every = ["--arms", "looped", "equal_flops", "equal_parameters"]
    seen: list[set[str]] = []

    def analyse(results: Results, folders: Folders, scale: str) -> Report:
        seen.append({arm for arm, _ in results})
        return Report({}, [])

    monkeypatch.setitem(lab.STUDIES, "khop", replace(STUDIES["khop"], analyse=analyse))
    lab.work(lab.parser().parse_args(["khop", *places, *every]))
    assert [len(arms) for arms in seen] == [3], "all arms are the study, and its own analysis"
    assert "subset" not in (tmp_path / "docs" / "khop-smoke" / "results.md").read_text()


def test_report_takes_neither() -> None:
    with pytest.raises(LabError, match="trains nothing"):
        lab.work(lab.parser().parse_args(["report", "--seeds", "0"]))


def test_what_other_workers_measure_is_shown_too() -> None:
    report = subset_report({
        ("once", 0): {"seconds": 1.0, "final": {"4": {"train": 1.0, "held out": 0.5}}, "history": [[1, {}]]},
        ("once", 1): {"diverged": "step 9: loss is nan"},
        ("text", 0): {"losses": {"10": 2.0, "2": 3.0}},
    })  # fmt: skip
    captions = {caption: rows for caption, rows in report.tables}
    assert captions["share answered"] == [
        ["arm", "seed", "T=4 held out", "T=4 train"],
        ["once", "0", "0.5000", "1.0000"],
    ]
    assert captions["loss in nats per token"] == [["arm", "seed", "T=2", "T=10"], ["text", "0", "3.0000", "2.0000"]]
    assert captions["Runs"][2] == ["once", "1", "", "", "step 9: loss is nan"]
    assert "history" not in report.numbers["once, seed 0"]
