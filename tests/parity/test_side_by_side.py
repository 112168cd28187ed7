"""The side-by-side measurement at small size: all sides are there and compute the same numbers, or it says so."""

import json

import pytest
import torch

from mythos_ds.bench import side_by_side
from mythos_ds.bench.side_by_side import FULL, MODELS, THEIRS, Side, compare
from mythos_ds.errors import LabError
from tools import bench_side_by_side

SMALL = {
    "DIM": 32, "EXPERTS": 8, "EXPERT_DIM": 16, "VOCABULARY": 61, "BATCH": 2, "SEQ": 16, "MOE_TOKENS": 32,
    "LOSS_TOKENS": 600, "LOSS_VOCABULARY": 4096,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time."""
    for name, value in SMALL.items():
        monkeypatch.setattr(side_by_side, name, value)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    even, untrained = compare(name, 1)
    assert (even["routing"], untrained["routing"]) == ("even", "untrained")
    for found in (even, untrained):
        assert set(found["times_ours"]) == {THEIRS}
        assert found["seconds"][THEIRS] > 0


def test_experts_and_loss() -> None:
    for found in compare("moe", 1):
        modes = {f"transformers {mode}" for mode in ("eager", "batched_mm", "grouped_mm")}
        assert set(found["times_ours"]) == {THEIRS, *modes}
    for found in compare("cross-entropy", 1):
        assert set(found["times_ours"]) == {FULL}
        assert 0 < found["memory_of_ours"] < 0.6


def test_sides_that_compute_other_numbers_are_not_compared() -> None:
    sides = [Side("one", lambda: torch.ones(3)), Side("other", lambda: torch.tensor([1.0, 1.0, 1.1]))]
    with pytest.raises(LabError, match="other computes other numbers") as error:
        side_by_side._measured(sides, 1, 1e-3)
    assert error.value.code == "MDS761"


def test_the_command_prints_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "compare", lambda name, repetitions: [{"case": name, "n": repetitions}])
    parser = bench_side_by_side.parser()
    bench_side_by_side.work(parser.parse_args(["--only", "moe", "gqa-4", "--repetitions", "2"]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"case": "moe", "n": 2}, {"case": "gqa-4", "n": 2}]
