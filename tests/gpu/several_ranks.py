"""Call 2: layouts of several ranks, which share one GPU, against one process."""

from typing import Any

from mythos_ds.bench.acceptance import Probe
from tests.distributed.cases import LOOPS, largest
from tests.gpu.ranks import check_order, on_ranks

CASES = "tests.gpu.staged_cases"
LIMIT_S = 110.0
RING = {"ep": 2, "stage": 3, "pp": 2}
LITERAL = {"ep": 2, "stage": 3, "pp": [1, 2, 1], "accumulation": 4}


def hold(probe: Probe, name: str, per_rank: list[dict[str, Any]], index: int) -> None:
    """The tolerances of the suite, on the rank that is worst; ten times these on a GPU, as the reference is a CPU's."""
    own = [rank["layouts"][index] for rank in per_rank]
    slack = 10.0 if probe.on_gpu else 1.0
    probe.number(f"{name}: loss, relative", largest(found["loss"] for found in own), at_most=slack * 1e-6)
    probe.number(f"{name}: gradient norm, relative", largest(found["norm"] for found in own), at_most=slack * 1e-6)
    probe.number(f"{name}: weights", largest(found["weight"] for found in own), at_most=slack * 1e-5)
    probe.number(f"{name}: router buffers", largest(found["buffer"] for found in own), at_most=slack * 1e-6)
    probe.number(f"{name}: smallest norm, so that clipping is active", own[0]["smallest_norm"], at_least=0.3)
    probe.number(f"{name}: names that differ", sum(not found["same_names"] for found in own), equals=0)


def compare_layouts(probe: Probe, count: int, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Train each case on `count` ranks beside one process, and look at the order of what was issued; what each rank
    found."""
    per_rank = on_ranks(f"{CASES}:parity", count, device=probe.device_type, limit_s=LIMIT_S, cases=list(cases.values()))
    for index, name in enumerate(cases):
        hold(probe, name, per_rank, index)
    check_order(probe, [rank["log"] for rank in per_rank], f"{count} ranks")
    return per_rank


def primitives(probe: Probe) -> None:
    per_rank = on_ranks(f"{CASES}:primitives", 2, device=probe.device_type, limit_s=60.0)
    for name in per_rank[0]["differences"]:
        probe.number(name, largest(rank["differences"][name] for rank in per_rank), equals=0)
    probe.number("ranks on the device", sum(rank["device"] == probe.device_type for rank in per_rank), equals=2)


def two_ranks(probe: Probe) -> None:
    own = {"ep": 2, "checkpointing": "loop"}
    cases = {
        "EP 2 x ZeRO-3": {**own, "stage": 3, "optimizer": "adamw"},
        "EP 2 x ZeRO-1": {**own, "stage": 1, "optimizer": "sgd"},
    }
    compare_layouts(probe, 2, cases)


def two_ranks_bf16(probe: Probe) -> None:
    """bf16 beside fp32 over ten steps."""
    cases = [{"ep": 2, "stage": 3, "dtype": dtype} for dtype in ("float32", "bfloat16")]
    per_rank = on_ranks(f"{CASES}:losses", 2, device=probe.device_type, limit_s=LIMIT_S, cases=cases, steps=10)
    full, half = per_rank[0]["losses"]
    worst = largest(abs(one - other) / one for one, other in zip(full, half, strict=True))
    probe.number("loss in bf16, relative to fp32", worst, at_most=1e-2)
    probe.number("steps with the very loss of fp32", sum(a == b for a, b in zip(full, half, strict=True)), equals=0)
    check_order(probe, [rank["log"] for rank in per_rank], "bf16")


def four_ranks(probe: Probe) -> None:
    compare_layouts(probe, 4, {"EP 2 x 2 copies, ZeRO-3": {"ep": 2, "stage": 3, "optimizer": "adamw"}})


def ring(probe: Probe) -> None:
    per_rank = compare_layouts(probe, 2, {"ring of 2": {**RING, "ep": 1, "optimizer": "sgd"}})
    shares = [share for rank in per_rank for share in rank["idle"]]
    probe.number("smallest idle share", min(shares), at_least=0.0)
    probe.number("largest idle share", max(shares), at_most=1.0)
    probe.number("steps with an idle share", len(per_rank[0]["idle"]), equals=len(LOOPS))


def stages(probe: Probe) -> None:
    cases = {
        "ring of 2, EP 2": {**RING, "optimizer": "adamw", "checkpointing": "loop"},
        "stages of 1, 2 and 1 ranks": {**LITERAL, "optimizer": "sgd"},
    }
    compare_layouts(probe, 4, cases)


def gradient_types(probe: Probe) -> None:
    case = {"ep": 2, "stage": 3}
    per_rank = on_ranks(f"{CASES}:gradient_types", 4, device=probe.device_type, limit_s=LIMIT_S, case=case)
    probe.number(
        "gradient averaged in bf16, relative to fp32", largest(rank["difference"] for rank in per_rank), at_most=5e-3
    )
    probe.number("the same on every rank and not zero", min(rank["difference"] for rank in per_rank), at_least=1e-6)
    types = per_rank[0]["types"]
    probe.note("types on the wire", types)
    probe.number("types as configured", types == {"bf16": ["torch.bfloat16"], "fp32": ["torch.float32"]}, equals=1)
    check_order(probe, [rank["log"] for rank in per_rank], "4 ranks in bf16")
