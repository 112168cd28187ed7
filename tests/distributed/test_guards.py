"""The reasons for the looped block being one ZeRO-3 leaf, kept proven: the obvious alternatives give wrong gradients,
without an error. Where this test fails because they became right, docs/deepspeed.md and engine/build.py can be made
simpler.
"""

import pytest

from tests.helpers.distributed import run_distributed

RIGHT = 1e-5
WRONG = 1e-2


@pytest.fixture(scope="module")
def errors():
    return run_distributed("tests.distributed.guard_cases:gradient_errors", 2, 300.0)[0]


@pytest.mark.parametrize(
    "arrangement",
    ["loop is the leaf, non-reentrant", "loop is the leaf, no recompute", "no leaf, non-reentrant"],
)
def test_right_arrangements(errors, arrangement):
    assert errors[arrangement] < RIGHT


@pytest.mark.parametrize(
    "arrangement",
    ["no leaf, reentrant", "iterated block is the leaf", "iterated block is the leaf, non-reentrant"],
)
def test_arrangements_that_go_wrong_silently(errors, arrangement):
    assert errors[arrangement] > WRONG
