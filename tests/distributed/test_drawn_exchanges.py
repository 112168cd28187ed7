"""No rank waits for ever, whatever is drawn: loops, documents, ranks that get no rows; and the order of collectives is
one that NCCL carries out."""

from typing import Any

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.referee import mixed_roles, problems

STEPS = 200
"""Of all cases of a number of ranks together."""
TIMEOUT_S = 1500.0


def cases(world_size: int) -> list[dict[str, Any]]:
    """Dispatchers with lanes and without, over all ranks, and in a ring of two stages."""
    node = {2: 1, 4: 2, 8: 4}[world_size]
    plain: list[dict[str, Any]] = [
        {"ep": world_size, "dispatch": "all_to_all", "overlap": True, "checkpointing": "loop", "stage": 3},
        {"ep": world_size, "dispatch": "per_rank", "overlap": True, "checkpointing": "layer", "stage": 1},
    ]
    if world_size > 2:
        by_node = {"ep": world_size, "dispatch": "per_node", "node": node}
        plain += [
            {**by_node, "overlap": True, "checkpointing": "layer", "stage": 3},
            {**by_node, "overlap": False, "checkpointing": "none", "stage": 1},
            {
                "ep": world_size // 2,
                "dispatch": "per_rank",
                "overlap": True,
                "checkpointing": "loop",
                "stage": 3,
                "pp": 2,
            },
        ]
    made = []
    for case in plain:
        accumulation = case.get("pp", 1)
        rows = 2 * accumulation * world_size // case.get("pp", 1)
        training = {"micro_batch_size": 2, "global_batch_size": rows}
        made.append({**case, "accumulation": accumulation, "training": training, "model": {"n_experts": 8}})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_drawn_steps_end(world_size: int) -> None:
    drawn = cases(world_size)
    found = run_distributed(
        "tests.distributed.drawn_exchange_cases:run", world_size, TIMEOUT_S, cases=drawn, steps=STEPS // len(drawn)
    )
    for number, case in enumerate(drawn):
        own = [rank[number] for rank in found]
        assert all(rank["finite"] for rank in own), case
        assert own[0]["ranks_without_rows"] > 0, case
        logs = [rank["events"] for rank in own]
        assert all(logs), case
        assert problems(logs) == [], case
        assert mixed_roles(logs) == [], case
