"""Pipelines train the same model as one process: against the independent reference, in fp32, with the loop count
changing in every step, truncated backpropagation, active clipping and auxiliary losses. What they send is counted."""

from typing import Any

import pytest

from tests.distributed.cases import DENSE, toy_model
from tests.distributed.test_layouts import check_parity
from tests.helpers.distributed import run_distributed

TIMEOUT_S = 600.0
MODULE = "tests.distributed.pipeline_cases"
RING = {"ep": 2, "stage": 3, "pp": 2, "optimizer": "adamw"}
FOUR_STAGES = {
    "ep": 1,
    "stage": 3,
    "pp": 4,
    "accumulation": 4,
    "model": {"recurrent_layers": 4, "prelude_layers": 3, "coda_layers": 2, "prelude_norm": False},
}
LITERAL = {"ep": 2, "stage": 3, "pp": [1, 2, 1], "accumulation": 4}
TIED = {"model": {"tie_embeddings": True}}
POST = {"model": {"injection": "post", "lora_target": "output"}}

BY_LAYER = {**RING, "checkpointing": "layer", "optimizer": "sgd", "model": {**POST["model"], "recurrent_layers": 4}}

REPRESENTATIVE = [
    {**RING, "checkpointing": "loop"},
    {**RING, "checkpointing": "none", "optimizer": "sgd", **TIED},
    {**RING, "checkpointing": "loop", "optimizer": "sgd", **POST},
    {**FOUR_STAGES, "optimizer": "adamw"},
    BY_LAYER,
    {**RING, "checkpointing": "loop", "optimizer": "sgd", "model": DENSE},
    {**RING, "checkpointing": "loop", "optimizer": "sgd", "training": {"frozen": ["embed.*", "prelude.*"]}},
    {**LITERAL, "optimizer": "sgd", **TIED},
    {**RING, "checkpointing": "loop", "optimizer": "sgd", "masked": True},
    {**LITERAL, "optimizer": "sgd", "masked": True},
]
THOROUGH: dict[int, list[dict[str, Any]]] = {
    2: [
        {"ep": 1, "stage": 3, "pp": 2},
        {"ep": 1, "stage": 3, "pp": 2, "ramp": True},
        {"ep": 1, "stage": 3, "pp": 2, "model": {"coda_layers": 0}},
    ],
    3: [
        {"ep": 1, "stage": 3, "pp": 3, "accumulation": 4, "model": {"recurrent_layers": 3}},
        {"ep": 1, "stage": 3, "pp": 3, "accumulation": 8, "model": {"recurrent_layers": 3, "tie_embeddings": True}},
        {"ep": 1, "stage": 3, "pp": [1, 1, 1], "accumulation": 4},
    ],
    4: [
        RING,
        {**RING, "accumulation": 4},
        {**RING, **TIED},
        {**RING, **POST},
        {**RING, "offload": "optimizer"},
        {**RING, "model": {"prelude_norm": False, "loop_embedding": "none", "lora_rank": 0}},
        {**RING, "model": {"injection": "post", "prelude_norm": False, "initial_state": "embedding"}},
        {**RING, "ep": 1},
        {**RING, "training": {"frozen": ["coda.*", "lm_head.*", "recurrent.layers.0.attn.*"]}},
        FOUR_STAGES,
        LITERAL,
        {**LITERAL, "ep": 1},
        {**LITERAL, **TIED},
        {"ep": 1, "stage": 3, "pp": [1, 1, 2], "accumulation": 4},
    ],
    8: [RING, {**RING, **TIED}, {**RING, "ep": 4}],
}


@pytest.mark.parametrize(("world_size", "cases"), [(4, REPRESENTATIVE), (8, [{**RING, "optimizer": "sgd"}])])
def test_representative_pipelines(world_size, cases):
    check_parity(cases, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", sorted(THOROUGH))
def test_every_pipeline(world_size):
    cases = [
        {**case, "checkpointing": checkpointing, "optimizer": optimizer}
        for case in THOROUGH[world_size]
        for checkpointing in ("loop", "none")
        for optimizer in ("adamw", "sgd")
    ]
    check_parity([*cases, *({**case, "masked": True, "optimizer": "sgd"} for case in THOROUGH[world_size])], world_size)


@pytest.fixture(scope="module")
def traffic():
    """What each of four ranks counted in `pipeline_cases.traffic`, for the ring with two and four micro-batches and for
    literal stages."""
    ring = {**RING, "checkpointing": "loop", "loops": [1, 4, 16]}
    cases = [{**ring, "accumulation": 2}, {**ring, "accumulation": 4}, {**LITERAL, "loops": [1, 4, 16]}]
    return run_distributed(f"{MODULE}:traffic", 4, TIMEOUT_S, cases=cases)


def test_gradients_are_reduced_once_and_weights_gathered_once(traffic):
    for rank in traffic:
        ring, literal = [*rank[0], *rank[1]], rank[2]
        for entries in (ring, literal):
            gathered = {entry["bytes"].get("all_gather_into_tensor", 0) for entry in entries}
            reduced = {entry["bytes"]["reduce_scatter_tensor"] for entry in entries}
            whole, experts = entries[0]["stage_bytes"], entries[0]["own_expert_bytes"]
            # Each expert lies on one rank of its stage, and a stage of one process holds everything: nothing to gather.
            expected = 0 if entries is literal and entries[0]["stage"] != 1 else whole - experts
            assert gathered == {expected}, "independent of loops and micro-batches"
            assert len(reduced) == 1
            assert {entry["reduce_passes"] for entry in entries} == {1}


def test_messages_and_held_visits_are_those_of_the_simulation(traffic):
    for rank in traffic:
        for entries in rank:
            for entry in entries:
                assert entry["bytes"]["isend"] == entry["predicted_sent"], entry
                assert entry["held"] == entry["predicted_held"], entry


def test_loops_without_gradient_hold_nothing(traffic):
    for entries in (traffic[0][0], traffic[0][1]):
        shallow, deep = (entry["held"] for entry in entries[1:])
        assert shallow == deep, "4 and 16 loops, of which the last 2 carry gradient"


@pytest.fixture(scope="module")
def special():
    """What each of four ranks found in `pipeline_cases.special_cases`."""
    return run_distributed(f"{MODULE}:special_cases", 4, TIMEOUT_S)


def test_evaluation_and_logits(special):
    for found in (rank["inference"] for rank in special):
        assert found["loss"] <= 1e-6
        assert found["logits"] <= 1e-6


def test_a_gradient_that_is_not_finite_on_one_stage_stops_all(special):
    for found in (rank["skipped"] for rank in special):
        assert found["error"] is not None
        assert "gradient norm is inf" in found["error"]
        assert found["moved"] == 0


def test_tied_copies_stay_equal(special):
    assert [rank["tied_copies"] for rank in special] == [0.0] * 4


def test_bf16_is_as_close_to_fp32_as_without_pipeline(special):
    for losses in (rank["precisions"]["losses"] for rank in special):
        for name in ("ring", "literal"):
            assert losses[name] == pytest.approx(losses["plain"], rel=1e-3)
            assert losses[name] == pytest.approx(losses["float32"], rel=2e-3)
            assert losses[name] != losses["float32"], "bf16 must be on"
    assert special[0]["precisions"] == special[3]["precisions"]
    assert special[0]["precisions"]["buffers"] == ["torch.float32"]
    assert special[0]["precisions"]["gradients"] == ["torch.float32"]


def test_no_stage_ever_holds_the_whole_model(special):
    """Parameters that were made on each rank, in elements: the layers of its stage, and its share of the experts."""
    per_expert = 3 * toy_model().dim * toy_model().expert_dim
    for rank in special:
        made = rank["made"]
        assert made["recurrent"] == 1
        assert made["experts"] == toy_model().n_experts // 2 * per_expert
        assert made["embed"] == (made["stage"] == 0)
        assert made["lm_head"] == (made["stage"] == 1)
