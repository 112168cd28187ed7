"""Bytes on the wire, counted: weight gathers do not depend on the loop count, the expert exchange follows its formula,
and recomputation counts no token twice and asks for no count again."""

import math

import pytest

from tests.distributed.cases import GLOBAL_BATCH, SEQ_LEN, toy_model
from tests.helpers.distributed import run_distributed

MODULE = "tests.distributed.communication_cases"
TIMEOUT_S = 300.0
LOOPS = [1, 4, 16]
GRAD_LOOPS = [None, 2]


def exchanged_row_bytes(n_loops: int, n_grad_loops: int, checkpointing: str, layers: int, row_bytes: int) -> int:
    """Payload of all ranks and one micro-batch: each call sends every token's rows to its k experts and back.

    A forward has two exchanges per layer and loop; the loops with gradient add two in backward and, where they are
    recomputed, two more.
    """
    exchanges = 2 * n_loops + 2 * n_grad_loops + (2 * n_grad_loops if checkpointing != "none" else 0)
    rows = GLOBAL_BATCH * SEQ_LEN * toy_model().n_experts_per_tok
    return layers * exchanges * rows * row_bytes


def exchanged_count_bytes(n_loops: int, layers: int) -> int:
    """The int64 counts that precede the rows, per rank: once per layer and loop, whether it is recomputed or not, as a
    recompute replays the routing of its forward."""
    return layers * n_loops * toy_model().n_experts * 8


@pytest.fixture(scope="module")
def measured():
    """What each of two ranks measured in `communication_cases.bytes_and_counts`."""
    return run_distributed(f"{MODULE}:bytes_and_counts", 2, TIMEOUT_S, loops=LOOPS, grad_loops=GRAD_LOOPS)


@pytest.mark.parametrize("index", [0, 1], ids=["all loops with gradient", "truncated"])
def test_bytes_per_step(measured, index):
    grad_loops = GRAD_LOOPS[index]
    per_rank = [rank["bytes"][index] for rank in measured]
    layers, row_bytes = toy_model().recurrent_layers, 4 * toy_model().dim
    for entries in zip(*per_rank, strict=True):
        first = entries[0]
        loops, checkpointing = first["n_loops"], first["checkpointing"]
        with_gradient = min(grad_loops or loops, loops)
        # Each expert lies on one rank only, so expert weights are never gathered.
        assert {entry["bytes"]["all_gather_into_tensor"] for entry in entries} == {2 * first["dense_bytes"]}
        rows = sum(entry["bytes"]["all_to_all_single"] for entry in entries)
        assert rows == exchanged_row_bytes(loops, with_gradient, checkpointing, layers, row_bytes)
        counts = exchanged_count_bytes(loops, layers)
        assert {entry["bytes"]["all_to_all_single:integers"] for entry in entries} == {counts}


@pytest.mark.slow
def test_weight_gathers_with_experts_on_several_ranks():
    per_rank = run_distributed(
        f"{MODULE}:gathered_and_exchanged", 4, TIMEOUT_S, loops=LOOPS, grad_loops=2, checkpointing=["loop"]
    )
    for entries in per_rank:
        gathered = {entry["bytes"]["all_gather_into_tensor"] for entry in entries}
        assert gathered == {2 * (entries[0]["dense_bytes"] + entries[0]["expert_bytes"])}


def test_recomputation_counts_no_token_twice(measured):
    tokens = GLOBAL_BATCH // (2 * 2) * SEQ_LEN  # of one rank's micro-batch
    for *recomputed, plain in (rank["counts"] for rank in measured):
        assert recomputed == [plain, plain]
        for layer in plain["counts"]:
            assert [sum(loop) for loop in layer] == [tokens * toy_model().n_experts_per_tok] * 5


def test_a_recompute_replays_the_exchange(measured):
    """Whatever it sees: ranks that chose anew would send other numbers of rows than the others expect."""
    for found in (found for rank in measured for found in rank["perturbed"]):
        assert (found["changed"], found["recomputed"]) == (0, 2 * toy_model().recurrent_layers)
        assert math.isfinite(found["grad_norm"])
