"""IsoFLOP fits: known laws are found, and too little is refused."""

import math

import pytest

from mythos_ds.errors import LabError
from mythos_ds.lab.studies.scaling import best_depth, exponent, fit

DEPTHS = (1, 2, 3, 4, 6, 8)


def _bowl(depth: float, lowest: float) -> float:
    return 3.0 + 0.1 * (math.log(depth) - math.log(lowest)) ** 2


def test_the_lowest_point_of_a_parabola_is_found() -> None:
    assert best_depth(DEPTHS, [_bowl(depth, 3.3) for depth in DEPTHS]) == pytest.approx(3.3)


@pytest.mark.parametrize("losses", [[_bowl(d, 20.0) for d in DEPTHS], [-_bowl(d, 3.0) for d in DEPTHS]])
def test_no_minimum_inside_is_refused(losses: list[float]) -> None:
    with pytest.raises(LabError, match="no minimum"):
        best_depth(DEPTHS, losses)


def test_three_depths_or_three_budgets_are_refused() -> None:
    with pytest.raises(LabError, match="3 depths"):
        best_depth((1, 2, 4), (3.0, 2.9, 3.0))
    with pytest.raises(LabError, match="3 budgets"):
        exponent((1.0, 2.0, 4.0), (1.0, 2.0, 3.0))


def _points(lowest) -> dict:
    return {c: {d: [_bowl(d, lowest(c)), _bowl(d, lowest(c)) + 1e-4] for d in DEPTHS} for c in (1.0, 2.0, 4.0, 8.0)}


def test_a_power_law_is_found_with_an_interval_around_it() -> None:
    tokens = {c: {d: 1e6 * c / (1 + d) for d in DEPTHS} for c in (1.0, 2.0, 4.0, 8.0)}
    found = fit(_points(lambda c: 2.0 * c**0.4), tokens)
    assert found["depth"] == pytest.approx(0.4, abs=1e-3)
    low, high = found["depth_interval"]
    assert low <= found["depth"] <= high
    assert found["resamples_with_a_fit"] == 1.0


def test_budgets_without_a_minimum_leave_no_exponent_and_say_why() -> None:
    points = _points(lambda c: 2.0 if c < 8 else 50.0)
    found = fit(points, {c: dict.fromkeys(DEPTHS, 1e6) for c in points})
    assert "depth" not in found
    assert "3 budgets" in found["refused"]
    assert "no minimum" in found["optima"][8.0]
