"""What runs inside the processes of test_attention_core: an engine whose attention is given to it."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.config.resolve import resolve
from mythos_ds.engine.build import build_engine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.kernels.attention import causal_attention
from mythos_ds.parallel.groups import init_parallel
from tests.distributed.cases import global_batches, toy_run


class CountingCore(nn.Module):
    """The plain core as a module with a weight, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The attention of q over k and v."""
        self.calls += 1
        return causal_attention(q, k, v, **options)


def run(case: dict[str, Any], n_loops: int) -> dict[str, Any]:
    """Loss and names of weights of an engine with the plain core, and of one with a counting core; its calls."""
    environment = ProcessEnvironment.detect(os.environ)
    resolved = resolve(toy_run(case, environment.world_size), environment.world_size)
    groups = init_parallel(environment, case["ep"], resolved.stages, timeout_s=120.0)
    core = CountingCore()
    results = []
    for options in ({}, {"attention_core": core}):
        engine = build_engine(resolved, groups, **options)
        batch = global_batches(0, accumulation=2)[0]
        loss = engine.module(batch["tokens"], n_loops=n_loops, targets=batch["targets"])
        names = [name for name, _ in engine.module.named_parameters()]
        results.append({"loss": loss.item(), "names": names, "calls": core.calls})
        engine.deepspeed.destroy()
    return {"plain": results[0], "given": results[1]}
