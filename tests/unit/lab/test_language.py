"""Losses of language runs: a model without a loop is judged at the one depth it was trained at."""

import math

import pytest

from mythos_ds.lab.spec import Arm
from mythos_ds.lab.studies.language import BASELINE, loss_at, paired_difference, table, unlooped

LOOPED = {"losses": {"1": 5.0, "4": 4.0, "8": 4.1, "32": 4.2}, "trained_depth": 4}
# The trainer evaluates at 1, 2, 4 and 8 times the trained depth of 1: the latter three mean nothing here.
PLAIN = {"losses": {"1": 4.5, "2": 4.6, "4": 9.0, "8": 9.9}, "trained_depth": 1}
COST = {"parameters": 10, "training_flops": 1e15, "seconds": 1.0}


def test_a_model_without_a_loop_is_judged_at_its_depth() -> None:
    assert loss_at(LOOPED, 8) == 4.1
    assert loss_at(PLAIN, 4) == 4.5


def test_differences_are_taken_seed_by_seed() -> None:
    shifted = {**LOOPED, "losses": {"4": 14.0}}
    plain = {**PLAIN, "losses": {"1": 14.75}}
    results = {("looped", 0): LOOPED, ("looped", 1): shifted, ("one", 0): PLAIN, ("one", 1): plain}
    assert paired_difference(results, "one", "looped") == "0.6250 ± 0.1768"  # of 0.5 and 0.75


def test_the_table_shows_ratios_of_looped_arms_only() -> None:
    results = {("looped", 0): {**LOOPED, **COST}, ("one", 0): {**PLAIN, **COST}}
    looped, one = table(results, [BASELINE, Arm("one", "one", unlooped(1))], "looped")[1:]
    assert float(looped[3]) == pytest.approx(math.exp(0.1), abs=1e-4)
    assert looped[6] == "4"
    assert (one[1], one[3:7]) == ("4.5000", ["", "", "", ""])
