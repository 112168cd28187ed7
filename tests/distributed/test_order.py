"""What ranks send is in an order that NCCL carries out, which gloo does not ask for: the same on all ranks over groups
that overlap, and messages that no other message of another role holds up."""

from typing import Any

import pytest

from mythos_ds.engine import deepspeed_patches
from mythos_ds.engine.deepspeed_patches import order_gathers
from mythos_ds.errors import ParallelError
from tests.helpers.distributed import run_distributed
from tests.helpers.referee import mixed_roles, problems

MODULE = "tests.distributed.order_cases"
TIMEOUT_S = 400.0
PATIENCE_S = 3.0
PLAIN: dict[str, dict[str, Any]] = {
    "experts, ZeRO-3": {"ep": 2, "stage": 3, "accumulation": 1},
    "experts, ZeRO-1": {"ep": 2, "stage": 1},
}
PIPELINES: dict[str, dict[str, Any]] = {
    "ring of two": {"ep": 2, "stage": 3, "pp": 2},
    "ring of two, tied": {"ep": 1, "stage": 3, "pp": 2, "model": {"tie_embeddings": True}},
    "ring of four": {"ep": 1, "stage": 3, "pp": 4, "accumulation": 4, "model": {"recurrent_layers": 4}},
    "literal stages": {"ep": 2, "stage": 3, "pp": [1, 2, 1], "accumulation": 4},
}
RING_OF_THREE = {"ep": 1, "stage": 3, "pp": 3, "accumulation": 4, "model": {"recurrent_layers": 3}}


@pytest.fixture(scope="module")
def found():
    """`order_cases.everything` of each of four ranks."""
    return run_distributed(
        f"{MODULE}:everything", 4, TIMEOUT_S, plain=[*PLAIN.values()], pipelines=[*PIPELINES.values()]
    )


def _logs(found, name):
    kind, cases = ("plain", PLAIN) if name in PLAIN else ("pipelines", PIPELINES)
    return [rank[kind][list(cases).index(name)] for rank in found]


@pytest.mark.parametrize("name", [*PLAIN, *PIPELINES])
def test_nothing_waits_for_ever(found, name):
    logs = _logs(found, name)
    assert all(logs)
    assert problems(logs) == []


@pytest.mark.parametrize("name", PIPELINES)
def test_a_communicator_has_one_role_on_each_rank(found, name):
    logs = _logs(found, name)
    assert any(event.get("op") == "send" for event in logs[0])
    assert mixed_roles(logs) == []


def test_a_ring_of_an_odd_number_of_stages():
    logs = [rank[0] for rank in run_distributed(f"{MODULE}:logs", 3, TIMEOUT_S, cases=[RING_OF_THREE])]
    assert problems(logs) == []
    assert mixed_roles(logs) == []


def test_the_referee_finds_what_is_planted(found):
    (problem,) = problems([rank["gathers"] for rank in found])
    assert "wait for each other" in problem
    assert mixed_roles([rank["messages"] for rank in found])


def test_gathers_come_in_one_order_in_every_start(found):
    """And without the order that is put on them ranks come to differ, by where their objects happen to lie."""
    ordered = [rank["starts"]["ordered"] for rank in found]
    assert {2, 4} <= {size for start in ordered[0] for size in start}
    assert ordered == [ordered[0]] * 4
    assert len({tuple(start) for start in ordered[0]}) == 1
    alone = [rank["starts"]["left alone"] for rank in found]
    assert alone != [alone[0]] * 4


@pytest.fixture(scope="module")
def of_two():
    """`order_cases.two_ranks` of both."""
    return run_distributed(f"{MODULE}:two_ranks", 2, TIMEOUT_S, limit_s=PATIENCE_S)


def test_weights_have_the_same_numbers_on_all_ranks(of_two):
    for rank in of_two:
        assert rank["apart"].startswith("the ranks of stages [0] made their weights in different orders")


def test_ranks_wait_for_one_that_works_alone(of_two):
    """Longer than a collective may wait; what all come to alike is waited for no longer than that."""
    for rank in (rank["agreed"] for rank in of_two):
        assert rank["worked"] > 1.4 * PATIENCE_S
        assert (rank["any"], rank["none"], rank["max"]) == (True, False, 1.0)
        assert (rank["sum"], rank["from"]) == ([0.2, 1.0], [0, "text"])
    assert "imed out" in of_two[1]["agreed"]["error"]
    assert of_two[1]["agreed"]["waited"] == pytest.approx(PATIENCE_S, abs=1.0)


def test_another_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed_patches, "_GATHER_SOURCE", "another")
    monkeypatch.setattr(deepspeed_patches, "_GATHER", "_PartitionedParameterCoordinator__all_gather_params_")
    with pytest.raises(ParallelError, match=r"nearest: pip install deepspeed==0\.19\.8, or parallel\.zero_stage=2"):
        order_gathers()
    monkeypatch.undo()
    with pytest.raises(ParallelError, match=r"version 0\.20\.0 has other code"):
        order_gathers("0.20.0")
