"""What runs inside the processes of test_compilation.py."""

from typing import Any

import torch
from torch import Tensor

from mythos_ds.engine.compilation import end_compilation
from mythos_ds.kernels import regions
from mythos_ds.train.trainer import with_depths
from tests.distributed.cases import ACCUMULATION, DEPTHS, GRAD_LOOPS, LOOPS, largest, opened, own_batches


def compared(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each layout, compiled against as written: how far losses and gradients are apart over steps of several depths,
    and what was compiled."""
    torch._inductor.config.compile_threads = 1  # no processes of the inductor's own stay behind
    return [_compared(case) for case in cases]


def _compared(case: dict[str, Any]) -> dict[str, Any]:
    (plain, plain_gradients, none), (compiled, gradients, names) = (_run(case, kind) for kind in ("none", "regions"))
    assert gradients.keys() == plain_gradients.keys()
    return {
        "loss": largest(abs(own - wanted) / abs(wanted) for own, wanted in zip(compiled, plain, strict=True)),
        "gradient": largest(_distance(gradients[name], wanted) for name, wanted in plain_gradients.items()),
        "gradients": len(gradients),
        "losses": plain,
        "compiled": names,
        "compiled_without": none,
    }


def _distance(own: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted element."""
    return ((own - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def _run(case: dict[str, Any], kind: str) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """Losses of steps that leave the weights as they are, the gradients of each, and the names of what was compiled."""
    own: dict[str, Tensor] = {}
    losses = []
    case = {**case, "training": {**case.get("training", {}), "compile": kind, "router_bias_rate": 0.0}}
    with opened(case) as (engine, groups):
        for step, loops in enumerate(LOOPS):
            batches = own_batches(step, case.get("accumulation", ACCUMULATION), groups)
            if case.get("per_sequence"):
                batches = with_depths(batches, DEPTHS[step], groups.layout)

            def read(loss: float, step: int = step) -> None:
                for name, parameter in engine.module.named_parameters():
                    gradient = engine.gradient(parameter)
                    if gradient is not None:
                        own[f"{step} {name}"] = gradient.float().clone()

            result = engine.train_step(batches, n_loops=loops, n_grad_loops=GRAD_LOOPS, lr=0.0, after_backward=read)
            losses.append(result.loss)
        names = sorted({key[0].__name__ for key in regions._Compiler.compiled})
    end_compilation()
    return losses, own, names
