"""The steps, the figures and the real model of `make loop-smollm`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.conversion.attention_sink import search_sink
from mythos_ds.conversion.convert import Request, plan_route
from mythos_ds.conversion.recipe import choose_cut, dense_config, recipe_cut
from mythos_ds.errors import LabError
from mythos_ds.lab.smollm.checks import source_difference
from mythos_ds.lab.smollm.questions import write_questions
from mythos_ds.lab.smollm.source import make_source, require_source
from mythos_ds.lab.smollm.steps import Steps
from mythos_ds.lab.smollm.verdict import Claim, draw, full_lines, lines, tuned_lines
from mythos_ds.weights.pickled import open_weights
from mythos_ds.weights.writer import write_tensors
from tests.helpers.paths import ROOT


def _evaluation(**losses: float) -> dict[str, Any]:
    """Four sequences, whose losses differ more between each other than between loop counts."""
    sequences = {n.removeprefix("n"): [loss + part for part in (-1.0, 0.0, 0.5, 0.5)] for n, loss in losses.items()}
    return {"text": "x", "sequences": sequences, "loss": {n: sum(own) / 4 for n, own in sequences.items()}}


def _results() -> dict[str, Any]:
    chat = {"ours": [1, 2, 3], "export": [1, 2, 3], "text": "a b c"}
    return {
        "source": {"difference": 5e-5, "largest": 40.0},
        "untrained": _evaluation(n1=2.3, n2=2.29, n4=2.28),
        "trained": _evaluation(n1=2.2, n2=2.19, n3=2.19, n4=2.19, n8=2.19),
        "chat": [{"loops": loops, **chat} for loops in (1, 2)],
        "control": _evaluation(n1=2.2),
        "trained_1": _evaluation(n1=2.2, n2=2.19),
        "control_1": _evaluation(n1=2.185),
        "control_compute": _evaluation(n1=2.1),
        "negative_untrained": _evaluation(n1=2.3, n2=2.4, n4=2.7),
        "negative": _evaluation(n1=2.2, n2=2.2, n3=2.3, n4=2.4, n8=2.5),
    }


def test_good_figures_are_held(tmp_path: Path) -> None:
    found = [*lines(_results()), *full_lines(_results())]
    assert not [line.name for line in found if line.held is False]
    by_name = {line.name: line for line in found}
    mean = by_name["mean of the seeds: 2 loops less the source trained on equal tokens"]
    assert (mean.held, mean.measured) == (True, pytest.approx(-0.0025))
    lost = next(line for line in found if "equal compute" in line.name)
    assert (lost.held, lost.measured) == (None, pytest.approx(0.09)), "reported, not asked for"
    assert all(line.error == pytest.approx(0, abs=1e-9) for line in found if line.error is not None)
    draw(_results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("untrained", _evaluation(n1=2.3, n2=2.31, n4=2.2), "untrained: 2 loops"),
        ("trained", _evaluation(n1=2.2, n2=2.19, n3=2.19, n4=2.19, n8=2.198), "trained: 8 loops"),
        ("source", {"difference": 2e-3, "largest": 40.0}, "the source's logits"),
        ("control_1", _evaluation(n1=2.1), "mean of the seeds"),
    ],
)
def test_a_figure_that_is_missed_is_said(part: str, value: dict[str, Any], named: str) -> None:
    results = {**_results(), part: value}
    missed = [line for line in [*lines(results), *full_lines(results)] if line.held is False]
    assert [named in line.name for line in missed] == [True]
    assert missed[0].cells()[-1] == "NOT HELD"


def test_an_answer_that_differs_is_a_miss() -> None:
    results = _results()
    results["chat"][1]["export"] = [1, 9, 3]
    assert [(line.measured, line.held) for line in lines(results)[-2:]] == [(0, True), (1, False)]
    assert Claim("x", float("nan"), None, 0.0).held is False


def test_tuning_is_held_to_losses_and_to_answers_that_end() -> None:
    chat = {"ours": [1, 2], "export": [1, 2], "text": "a b"}
    results: dict[str, Any] = {
        "untuned": _evaluation(n1=4.0, n2=4.0),
        "tuned": _evaluation(n1=2.5, n2=2.49),
        "answers": [{"loops": loops, "asked": 20, "ended": 20, "texts": []} for loops in (1, 2)],
        "tuned_chat": [{"loops": loops, **chat} for loops in (1, 2)],
    }
    assert not [line.name for line in tuned_lines(results) if line.held is False]
    results["answers"][1]["ended"] = 17
    missed = [line for line in tuned_lines(results) if line.held is False]
    assert [(line.measured, "2 loops that do not end" in line.name) for line in missed] == [(pytest.approx(0.15), True)]


def test_questions_that_are_asked_are_about_other_names(tmp_path: Path) -> None:
    write_questions(tmp_path / "training.jsonl", tmp_path / "held_out.json")
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    asked = json.loads((tmp_path / "held_out.json").read_text())
    names = {next(word for word in row["prompt"].split() if "." in word.rstrip(".?")) for row in rows}
    assert (len(asked), len(names)) == (20, len(rows))
    assert len(rows) > 500
    assert not any(name in question.split() for name in names for question in asked)


def test_a_step_is_done_once_and_says_why_it_failed(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    asked = [
        "convert",
        "--from",
        "mythos",
        "--to",
        "hf",
        "--input",
        ROOT / "models" / "tiny",
        "--output",
        tmp_path / "hf",
    ]
    first = steps.run("export", asked, threads=1)
    made = (tmp_path / "hf" / "config.json").stat().st_mtime_ns
    assert steps.run("export", asked, threads=1) == first
    assert (tmp_path / "hf" / "config.json").stat().st_mtime_ns == made
    with pytest.raises(LabError, match=r"was made with other settings; remove"):
        steps.run("export", [*asked, "--dtype", "float32"], threads=1)
    with pytest.raises(LabError, match=r"ended with exit code 2(.|\n)*not a model folder|not readable"):
        steps.run(
            "missing", ["convert", "--from", "mythos", "--to", "hf", "--input", tmp_path, "--output", "x"], threads=1
        )
    assert not (tmp_path / "steps" / "missing.json").exists()


def test_the_study_says_how_to_get_the_model(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="make loop-smollm"):
        require_source(tmp_path)


@pytest.mark.slow
def test_the_real_model_is_cut_after_its_sink(tmp_path: Path) -> None:
    """Layer 11 with text and with random tokens; 12 + 10 + 8; one loop is the source."""
    source = make_source(ROOT / ".cache" / "smollm")
    hf, weights = dense_config(source), open_weights(source, allow_pickle=False)
    sink = search_sink(weights, hf, source, 0, None)
    assert sink.layer == 11
    assert sink.ratio > 100
    assert search_sink(weights, hf, tmp_path, 0, None).layer == 11, "random tokens: no tokenizer there"
    cut = choose_cut(30, sink)
    assert cut == {"prelude": 12, "recurrent": 10, "coda": 8}
    route = plan_route(Request("hf", "mythos", source, None, cut=recipe_cut({}, cut)))
    write_tensors(route.source, tmp_path)
    route.finish(tmp_path)
    tokens = torch.randint(49152, (2, 64), generator=torch.Generator().manual_seed(3))
    assert source_difference(source, tmp_path, {"tokens": tokens})["difference"] <= 1e-3
    assert json.loads((tmp_path / "config.json").read_text())["facts"]["decay"] == 0.05
