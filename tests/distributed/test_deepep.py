"""The dispatcher "deepep" over a double of DeepEP's buffer: DeepSpeed's transport is used as it asks to be."""

from typing import Any

import pytest

from tests.distributed.cases import toy_model
from tests.distributed.deepep_cases import GRADED, LAYERS, LOOPS
from tests.distributed.dispatch_cases import DRAWS
from tests.helpers.distributed import run_distributed


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_distributed("tests.distributed.deepep_cases:everything", 2, 300.0)


@pytest.mark.parametrize("draw", range(len(DRAWS)))
def test_results_and_gradients(found: list[dict[str, Any]], draw: int) -> None:
    """Also of routing weights, with uneven rows, and ranks without any."""
    for rank in found:
        assert max(rank["calls"][draw].values()) <= 1e-5, rank["calls"][draw]


@pytest.mark.parametrize("mode", ["none", "layer", "loop"])
def test_a_model_learns_the_same(found: list[dict[str, Any]], mode: str) -> None:
    for rank in found:
        assert max(rank["models"][mode]["errors"].values()) <= 1e-5, rank["models"][mode]["errors"]


@pytest.mark.parametrize("mode", ["none", "layer", "loop"])
def test_layers_and_loops_share_one_buffer_that_is_freed(found: list[dict[str, Any]], mode: str) -> None:
    """A recompute repeats dispatches in the forward's order, and by layer no combine."""
    for rank in found:
        own = rank["models"][mode]
        assert (own["buffers"], own["freed"]) == (1, [True])
        calls = [call["call"] for call in own["calls"]]
        again = 0 if mode == "none" else GRADED * LAYERS
        combines = {"none": 0, "layer": 0, "loop": GRADED * (LAYERS - 1)}[mode]
        assert calls.count("dispatch") == LOOPS * LAYERS
        assert calls.count("dispatch again") == again + GRADED * LAYERS, "recomputes, and the backward of combines"
        assert calls.count("combine") == LOOPS * LAYERS + combines + GRADED * LAYERS, "and the backward of dispatches"
        for call in own["calls"]:
            if call["call"] == "dispatch":
                assert (call["rows"], call["weights"]) == ([32, toy_model().dim], True)


def test_what_cannot_run_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert 'given "deepep" on cpu' in rank["refused"]
        assert 'nearest: "per_rank"' in rank["refused"]
    assert any(
        "9 tokens in a micro-batch; allowed with parallel.dispatch deepep: at most 4" in r["sizes"] for r in found
    )
