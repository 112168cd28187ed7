"""Every layout trains the same model: against an independently written single-process reference, in fp32, with the loop
count changing in every step, truncated backpropagation, accumulation, active clipping and auxiliary losses."""

import itertools

import pytest

from tests.distributed.cases import DENSE
from tests.helpers.distributed import run_distributed

TIMEOUT_S = 600.0
CASES = "tests.distributed.cases"

REPRESENTATIVE = {
    2: [
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "adamw"},
        {"ep": 2, "stage": 3, "checkpointing": "none", "optimizer": "sgd"},
        {"ep": 2, "stage": 3, "checkpointing": "layer", "optimizer": "sgd"},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "per_sequence": True},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "adamw", "offload": "all"},
        {"ep": 2, "stage": 2, "checkpointing": "none", "optimizer": "adamw"},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "adamw", "ramp": True},
        {"ep": 2, "stage": 1, "checkpointing": "loop", "optimizer": "sgd", "ramp": True},
        {"ep": 1, "stage": 2, "checkpointing": "none", "optimizer": "sgd", "ramp": True, "offload": "optimizer"},
        {"ep": 1, "stage": 0, "checkpointing": "none", "optimizer": "sgd", "ramp": True},
        {"ep": 2, "stage": 1, "checkpointing": "loop", "optimizer": "sgd"},
        {"ep": 1, "stage": 3, "checkpointing": "loop", "optimizer": "sgd"},
        {"ep": 1, "stage": 0, "checkpointing": "none", "optimizer": "sgd"},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "model": DENSE},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "masked": True},
        {"ep": 1, "stage": 0, "checkpointing": "none", "optimizer": "sgd", "masked": True},
    ],
    4: [
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "adamw"},
        {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "sgd"},
        {"ep": 4, "stage": 1, "checkpointing": "none", "optimizer": "sgd"},
    ],
}

BEFORE_THE_LOOP = ["embed.*", "prelude.*"]
FROZEN = [
    {"ep": 2, "stage": 3, "checkpointing": "loop", "optimizer": "sgd", "training": {"frozen": BEFORE_THE_LOOP}},
    {"ep": 1, "stage": 3, "checkpointing": "none", "optimizer": "sgd", "training": {"frozen": ["embed.*"]}},
    {"ep": 1, "stage": 3, "checkpointing": "loop", "optimizer": "adamw", "training": {"frozen": ["embed.*", "lm_*"]}},
    {"ep": 2, "stage": 1, "checkpointing": "loop", "optimizer": "sgd", "training": {"frozen": BEFORE_THE_LOOP}},
]
"""What needs no gradient comes first, and ZeRO-3 learns from gradients of inputs that a module's backward is over."""
MORE_FROZEN = [
    {"ep": ep, "stage": stage, "checkpointing": checkpointing, "optimizer": optimizer, "training": {"frozen": frozen}}
    for ep, stage in ((1, 0), (1, 2), (1, 3), (2, 2), (2, 3))
    for checkpointing, optimizer in (("loop", "sgd"), ("none", "adamw"))
    for frozen in (["embed.*", "prelude.*", "recurrent.layers.0.attn.*"], ["coda.*", "lm_head.*"], ["recurrent.*"])
    if ep == 1 or frozen != ["recurrent.*"]  # experts that several ranks hold cannot be frozen
]


def every_layout(world_size: int) -> list[dict]:
    """(EP) x (ZeRO; 0 only with EP 1) x (recompute) x (optimizer) on this many processes."""
    return [
        {"ep": ep, "stage": stage, "checkpointing": checkpointing, "optimizer": optimizer}
        for ep, stage, checkpointing, optimizer in itertools.product(
            (1, 2, 4), (0, 1, 2, 3), ("loop", "none"), ("adamw", "sgd")
        )
        if ep <= world_size and (stage > 0 or ep == 1)
    ]


def check_parity(cases: list[dict], world_size: int) -> None:
    per_rank = run_distributed(f"{CASES}:layouts", world_size, TIMEOUT_S, cases=cases)
    for rank, results in enumerate(per_rank):
        for case, found in zip(cases, results, strict=True):
            assert found["same_names"], (rank, case)
            assert found["loss"] <= 1e-6, (rank, case, found)
            assert found["norm"] <= 1e-6, (rank, case, found)
            assert found["weight"] <= 1e-5, (rank, case, found)
            assert found["smallest_norm"] > 0.3, "clipping must be active"
            assert found["buffer"] <= 1e-6, (rank, case, found)
            assert found["largest_bias"] > 0.0, "the router bias must move"


@pytest.mark.parametrize("world_size", [2, 4])
def test_representative_layouts(world_size):
    check_parity(REPRESENTATIVE[world_size], world_size)


@pytest.mark.parametrize("cases", [FROZEN, pytest.param(MORE_FROZEN, marks=pytest.mark.slow)], ids=["some", "more"])
def test_parts_that_are_frozen(cases):
    check_parity(cases, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout(world_size):
    check_parity(every_layout(world_size), world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_targets_that_do_not_count_in_every_layout(world_size):
    """Rows and micro-batches of some ranks without any target that counts: a mean of means would be another number."""
    act = {"masked": True, "model": {"halting": "act"}, "training": {"ponder_cost": 0.0}}
    cases = [{**case, "masked": True} for case in every_layout(world_size) if case["checkpointing"] == "loop"]
    cases += [{**case, "per_sequence": True} for case in cases if case["optimizer"] == "sgd"]
    check_parity([*cases, {**cases[-1], **act, "per_sequence": False}], world_size)


@pytest.fixture(scope="module")
def special():
    """What each of two ranks found in `cases.special_cases`."""
    return run_distributed(f"{CASES}:special_cases", 2, TIMEOUT_S)


def test_buffers_keep_dtype_and_value_under_zero_init(special):
    for found in (rank["buffers"] for rank in special):
        assert found["dtypes"] == ["torch.float32"] * len(found["dtypes"])
        assert found["values"] == [0.0] * len(found["values"])
        # After four steps the bias is a sum of steps of 1e-2 (centred rows apart), which bf16 could not hold.
        assert found["bias_zero_init"][0] == "torch.float32"
        assert all(abs(value * 100 - round(value * 100)) < 1e-4 for value in found["bias_zero_init"][1])


def test_bf16_losses_with_and_without_zero_init(special):
    for losses in (rank["buffers"]["loss"] for rank in special):
        assert losses["zero_init"][0] == losses["plain"][0]
        assert losses["zero_init"] == pytest.approx(losses["plain"], rel=1e-3)
        assert losses["zero_init"] == pytest.approx(losses["float32"], rel=5e-3)
        assert losses["zero_init"] != losses["float32"], "bf16 must be on"
    assert special[0]["buffers"]["loss"] == special[1]["buffers"]["loss"]


def test_a_step_in_which_no_target_counts(special):
    """It moves by the auxiliary losses alone, and the run goes on."""
    for found in (rank["nothing_counts"] for rank in special):
        assert (found["loss"][1], found["eval"]) == (0.0, 0.0)
        assert 0 < found["norm"][1] < 0.1 * found["norm"][0]
        assert found["loss"][2] > 1


def test_a_rank_whose_experts_get_no_tokens(special):
    for found in (rank["no_tokens"] for rank in special):
        assert sum(found["counts"][2:]) == 0
        assert found["difference"] <= 1e-6


def test_a_gradient_that_is_not_finite_stops_every_rank(special):
    for found in (rank["skipped"] for rank in special):
        assert found["error"] is not None
        assert "gradient norm is inf" in found["error"]
        assert found["moved"] == 0


def test_a_loss_that_is_not_finite_stops_every_rank(special):
    for found in (rank["non_finite"] for rank in special):
        assert found["error"] is not None
        assert "loss is nan" in found["error"]
