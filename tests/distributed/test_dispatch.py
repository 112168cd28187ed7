"""Every dispatcher carries the same rows to the same experts: against a process that holds all of them, and in training
against the independent single-process reference; what each sends to whom equals its formula."""

import itertools
from collections import Counter
from typing import Any

import pytest

from tests.distributed.cases import GLOBAL_BATCH, SEQ_LEN, toy_model
from tests.distributed.dispatch_cases import DIM, DRAWS, EXPERTS, FP8, NAMES, NODE
from tests.distributed.test_layouts import check_parity
from tests.helpers.distributed import run_distributed

TIMEOUT_S = 900.0
RANKS, LOCAL = range(4), EXPERTS // 4
BOTH = (*NAMES, *(name + FP8 for name in NAMES))
SCALE = 4
"""Bytes of a row's scale in eight bits."""
IN_LANES = {"overlap": True, "accumulation": 1}
"""Micro-batches of two sequences on each of four ranks."""
CASES: list[dict[str, Any]] = [
    {"ep": 4, "stage": 3, "checkpointing": "layer", "optimizer": "sgd", "dispatch": "per_rank"},
    {"ep": 2, "stage": 1, "checkpointing": "none", "optimizer": "adamw", "dispatch": "per_rank"},
    {"ep": 4, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "dispatch": "per_node", "node": 2},
    {"ep": 4, "stage": 1, "checkpointing": "layer", "optimizer": "adamw", "dispatch": "per_node", "node": 2},
    {"ep": 4, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "dispatch": "all_to_all", **IN_LANES},
    {"ep": 2, "stage": 1, "checkpointing": "none", "optimizer": "adamw", "dispatch": "per_rank", **IN_LANES},
    {
        "ep": 4,
        "stage": 3,
        "checkpointing": "layer",
        "optimizer": "adamw",
        "dispatch": "per_node",
        "node": 2,
        **IN_LANES,
    },
]
WIDE = {"n_experts_per_tok": 4}


def slow_cases(world_size: int) -> list[dict[str, Any]]:
    """A covering set of pairs: dispatcher, EP, recompute, ZeRO, optimizer, experts per token, pipeline."""
    by = [("per_rank", 2, None), ("per_rank", 4, None), ("per_node", 4, 2), ("auto", 4, 2), ("auto", 2, 2)]
    made = []
    for number, ((name, ep, node), mode, stage) in enumerate(itertools.product(by, ("none", "layer", "loop"), (1, 3))):
        if ep > world_size:
            continue
        case = {"ep": ep, "stage": stage, "checkpointing": mode, "dispatch": name}
        case |= {"optimizer": ("adamw", "sgd")[(number + stage // 2) % 2]}
        case |= {"node": node} if node else {}
        case |= IN_LANES if number % 2 else {}
        case |= {"model": WIDE} if number % 3 == 0 else {}
        made.append(case)
    return made


def ring_cases() -> list[dict[str, Any]]:
    """The ring of two stages, each with its own experts."""
    return [
        {
            "ep": 2,
            "stage": 3,
            "pp": 2,
            "checkpointing": mode,
            "optimizer": optimizer,
            "dispatch": dispatch,
            "overlap": on,
        }
        for mode, optimizer in (("loop", "sgd"), ("layer", "adamw"), ("none", "sgd"))
        for dispatch, on in (("per_rank", False), ("per_rank", True), ("all_to_all", True))
    ]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of four ranks found in `dispatch_cases.everything`."""
    return run_distributed("tests.distributed.dispatch_cases:everything", 4, TIMEOUT_S, cases=CASES)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("draw", range(len(DRAWS)))
def test_results_and_gradients(found: list[dict[str, Any]], name: str, draw: int) -> None:
    """In float64, with uneven rows, ranks without any, experts that nobody chooses and all of a rank's chosen. Rows in
    eight bits arrive as the quantisation says, also over two hops; gradients are those of what arrived."""
    for rank, own in enumerate(rank["rows"][draw][name] for rank in found):
        assert max(own["errors"].values()) <= 1e-12, (rank, own["errors"])
        assert own["difference"] <= 1e-7, "a routing weight's gradient"
        assert own["same"], "a replayed decision gives the same bits"
        # Floats of two calls, integers of one.
        integers = {"all_to_all": 1, "per_rank": 2, "per_node": 4}[name.removesuffix(FP8)]
        floats = {"all_to_all": 2, "per_rank": 3, "per_node": 6}[name.removesuffix(FP8)]
        assert (sum(own["asked"]), own["asked"].count(False)) == (integers, 2 * floats)


def travelling(choices: list[list[list[int]]]) -> tuple[Any, Any, Any]:
    """Of each rank's tokens: pairs for each rank, tokens with any expert on it, and tokens with any on each node."""
    owners = [[[expert // LOCAL for expert in token] for token in rank] for rank in choices]
    pairs = [Counter(itertools.chain(*tokens)) for tokens in owners]
    copies = [Counter(itertools.chain(*(set(token) for token in tokens))) for tokens in owners]
    nodes = [Counter(itertools.chain(*({each // NODE for each in token} for token in tokens))) for tokens in owners]
    return pairs, copies, nodes


def expected_bytes(name: str, choices: list[list[list[int]]], source: int, target: int) -> tuple[int, int]:
    """Bytes of rows and weights, and of integers, that `source` sends to `target` in a forward and its backward, in
    fp32: a row that goes there has a gradient that comes back, and so has its result."""
    pairs, copies, nodes = travelling(choices)
    row = 4 * DIM
    sent = DIM + SCALE if name.endswith(FP8) else row  # of the first of these four ways
    name = name.removesuffix(FP8)
    if name == "all_to_all":  # a count for each of the target's experts
        return pairs[source][target] * (sent + row) + 2 * pairs[target][source] * row, 8 * LOCAL
    if name == "per_rank":
        rows = copies[source][target] * (sent + row) + 2 * copies[target][source] * row
        return rows + 4 * (pairs[source][target] + pairs[target][source]), 8 * (2 + pairs[source][target])
    floats = integers = 0
    if source % NODE == target % NODE:  # over nodes, to the rank of equal place

        def onward(one: int, other: int) -> tuple[int, int]:
            node = other // NODE
            return nodes[one][node], sum(pairs[one][each] for each in RANKS if each // NODE == node)

        (there, wanted), (back, owed) = onward(source, target), onward(target, source)
        floats += there * (sent + row) + 2 * back * row + 4 * (wanted + owed)
        integers += 8 * (1 + 2 * NODE + wanted)
    if source // NODE == target // NODE:  # inside the node, for all ranks of the source's place

        def handed(one: int, other: int) -> tuple[int, int]:
            senders = [rank for rank in RANKS if rank % NODE == one % NODE]
            return sum(copies[rank][other] for rank in senders), sum(pairs[rank][other] for rank in senders)

        (there, wanted), (back, owed) = handed(source, target), handed(target, source)
        floats += there * (sent + row) + 2 * back * row + 4 * (wanted + owed)
        integers += 8 * (2 + wanted)
    return floats, integers


@pytest.mark.parametrize("name", BOTH)
def test_bytes_between_each_two_ranks(found: list[dict[str, Any]], name: str) -> None:
    choices = [rank["bytes"][name]["choices"] for rank in found]
    for source, target in itertools.product(RANKS, RANKS):
        sent = found[source]["bytes"][name]["sent"]
        counted = sent["floats"][target], sent["integers"][target]
        assert counted == expected_bytes(name, choices, source, target), (source, target)
    between = {
        name: sum(
            rank["bytes"][name]["sent"]["floats"][target]
            for source, rank in enumerate(found)
            for target in RANKS
            if source // NODE != target // NODE
        )
        for name in NAMES
    }
    assert between["per_node"] < between["per_rank"] < between["all_to_all"], "bytes between nodes"


@pytest.mark.parametrize("name", ["per_rank", "per_node"])
def test_errors_in_bfloat16(found: list[dict[str, Any]], name: str) -> None:
    errors = found[0]["halves"]
    for what, error in errors[name].items():
        assert 0 < error <= 1.1 * errors["all_to_all"][what], what


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_eight_bits(found: list[dict[str, Any]], name: str) -> None:
    """Three bits of fraction: some hundredths of a row, of its result, and of the gradients."""
    plain, in_fp8 = (found[0]["halves"][each] for each in (name, name + FP8))
    for what, error in in_fp8.items():
        assert plain[what] < error < 0.08, what


def test_groups_of_nodes(found: list[dict[str, Any]]) -> None:
    assert [rank["groups"] for rank in found] == [
        [[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]],
    ]  # fmt: skip
    for said in found[0]["refused"]:
        assert "groups of two whole nodes or more" in said
    assert len(found[0]["refused"]) == 3
    names = [choice["name"] for choice in found[0]["chosen"]]
    assert names == ["per_rank", "per_node", "per_rank", "local"]
    assert all(choice["why"] for choice in found[0]["chosen"])


def test_training_gives_the_same(found: list[dict[str, Any]]) -> None:
    require_parity(CASES, [rank["layouts"] for rank in found])


def require_parity(cases: list[dict[str, Any]], per_rank: list[list[dict[str, Any]]]) -> None:
    """Loss, norm, weights and buffers as the reference's."""
    for results in per_rank:
        for case, own in zip(cases, results, strict=True):
            assert own["same_names"], case
            assert (own["loss"] <= 1e-6, own["norm"] <= 1e-6) == (True, True), (case, own)
            assert (own["weight"] <= 1e-5, own["buffer"] <= 1e-6) == (True, True), (case, own)


def test_experts_are_chosen_alike(found: list[dict[str, Any]]) -> None:
    """Counts by loop and expert, and the router's biases, to the bit."""
    for rank in found:
        counts = rank["counts"]
        for name in ("per_rank", "per_node"):
            for key in ("counts", "biases"):
                assert counts[name][0][key] == counts["all_to_all"][0][key], (name, key)


def step_bytes(name: str, checkpointing: str, dtype: str) -> list[float]:
    """Floats and integers of all ranks in `dispatch_cases.recomputed`: each token has two pairs on one rank."""
    loops, graded, model = 3, 2, toy_model()
    tokens, layers, row = GLOBAL_BATCH * SEQ_LEN, model.recurrent_layers, 4 * model.dim
    again = graded if checkpointing != "none" else 0
    saved = (loops + again) * (row - model.dim - SCALE) if dtype == "fp8" else 0
    share = {"none": 0.0, "layer": 0.0, "loop": (layers - 1) / layers}[checkpointing]
    if name == "all_to_all":
        trips = 2 * (loops + graded + again)
        return [layers * tokens * 2 * (trips * row - saved), layers * loops * 4 * model.n_experts * 8]
    out, back = loops + graded + again, loops + graded + again * share
    hops = 2 if name == "per_node" else 1
    counts = {"per_rank": 4 * 4 * 2, "per_node": 4 * (2 * (1 + 2 * NODE) + NODE * 2)}[name]
    floats = tokens * (row * (out + back) - saved + 4 * 2 * out) * hops
    return [layers * floats, layers * loops * 8 * (counts + hops * 2 * tokens)]


def test_bytes_of_a_step(found: list[dict[str, Any]]) -> None:
    """With weights applied at the expert's rank a recomputed layer's results do not travel a second time."""
    assert len(found[0]["steps"]) == 12
    for step in found[0]["steps"]:
        assert step["bytes"] == step_bytes(step["dispatch"], step["checkpointing"], step["dtype"]), step


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_dispatcher(world_size: int) -> None:
    check_parity(slow_cases(world_size), world_size)


@pytest.mark.slow
def test_every_dispatcher_in_a_ring() -> None:
    require_parity(ring_cases(), run_distributed("tests.distributed.cases:layouts", 4, TIMEOUT_S, cases=ring_cases()))
