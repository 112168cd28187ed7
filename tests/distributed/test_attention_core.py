"""An engine computes attention by the core that it is given, which is no part of its model."""

import pytest

from tests.helpers.distributed import run_distributed

LOOPS = 3


@pytest.mark.parametrize("stage", [1, 3])
def test_the_engine_hands_the_core_to_its_model(stage: int) -> None:
    case = {"ep": 1, "stage": stage, "checkpointing": "none"}
    (seen,) = run_distributed("tests.distributed.core_cases:run", 1, 120, case=case, n_loops=LOOPS)
    plain, given = seen["plain"], seen["given"]
    assert plain["calls"] == 0
    assert given["calls"] >= LOOPS
    assert (given["loss"], given["names"]) == (plain["loss"], plain["names"])
