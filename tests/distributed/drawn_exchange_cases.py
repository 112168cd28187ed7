"""What runs inside the processes of test_drawn_exchanges.py."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from mythos_ds.parallel.groups import ParallelGroups
from tests.distributed.cases import SEQ_LEN, opened
from tests.helpers.referee import refereed

NOTED = 5
"""Steps of each case whose collectives are handed to the referee."""
HELD_BACK = -1e3
"""Added to the scores of experts that a step keeps from being chosen: their ranks get no rows."""


def run(cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Trains `steps` drawn steps of each case: loops, loops with gradient, documents, and which experts get rows."""
    return [_drawn(number, case, steps) for number, case in enumerate(cases)]


def _drawn(number: int, case: dict[str, Any], steps: int) -> dict[str, Any]:
    draw, finite, without = random.Random(number), True, 0
    with refereed() as referee, opened(case) as (engine, groups):
        referee.take()
        noted: list[Any] = []
        for step in range(steps):
            loops = draw.randint(1, 5)
            graded = draw.randint(1, loops)
            for layer in engine.module.moe_layers():
                n, k = layer.n_experts, layer.router.k
                open_experts = draw.sample(range(n), draw.randint(k, n))
                layer.router.bias.fill_(HELD_BACK)[open_experts] = 0.0
                held = {expert * case["ep"] // n for expert in open_experts}
                without += case["ep"] - len(held)
            seed = draw.randrange(1 << 30)
            result = engine.train_step(_batches(seed, case, groups), n_loops=loops, n_grad_loops=graded, lr=1e-4)
            finite = finite and math.isfinite(result.loss)
            taken = referee.take()
            noted += taken if step < NOTED else []
    return {"finite": finite, "ranks_without_rows": without, "events": noted}


def _batches(seed: int, case: dict[str, Any], groups: ParallelGroups) -> list[dict[str, Tensor]]:
    """Micro-batches of the calling rank, documents of drawn lengths."""
    generator = torch.Generator().manual_seed(seed + groups.layout.dp_rank)
    rows, batches = case["training"]["micro_batch_size"], []
    for _ in range(case["accumulation"]):
        text = torch.randint(0, 64, (rows, SEQ_LEN + 1), generator=generator)
        starts = torch.rand(rows, SEQ_LEN, generator=generator) < torch.rand(1, generator=generator)
        starts[:, 0] = True
        places = torch.arange(SEQ_LEN).expand(rows, -1)
        positions = places - torch.where(starts, places, 0).cummax(1).values
        batches.append({"tokens": text[:, :-1].clone(), "targets": text[:, 1:].clone(), "positions": positions})
    return batches
