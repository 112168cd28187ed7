"""What runs inside the ranks of call 2."""

import os
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.engine.training_engine import StepResult, TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.parallel.groups import init_parallel
from tests.distributed.cases import LOOPS, layouts, opened, own_batches
from tests.gpu import staged_backend


def primitives() -> dict[str, Any]:
    """Every operation that the project or DeepSpeed uses, with a result that can be worked out: largest differences."""
    environment = ProcessEnvironment.detect(os.environ)
    groups = init_parallel(environment, 1, timeout_s=60.0)
    rank, size, device = groups.rank, groups.world_size, groups.device
    found: dict[str, float] = {}

    def compare(name: str, got: Tensor, want: Tensor | Sequence[float]) -> None:
        wanted = torch.as_tensor(want, dtype=torch.float64)
        found[name] = (
            (got.cpu().double().flatten() - wanted.double().flatten()).abs().max().item() if len(wanted) else 0.0
        )

    def ranks(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    total = sum(range(1, size + 1))
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
        compare(f"sum of {dtype}", groups.all_reduce(ranks(rank + 1, 2, dtype=dtype)), [total, 2 * size])
    largest = ranks(rank)
    torch_distributed.all_reduce(largest, op=torch_distributed.ReduceOp.MAX)
    compare("maximum", largest, [size - 1])
    average = ranks(rank + 1)
    torch_distributed.all_reduce(
        average, op=torch_distributed.ReduceOp.AVG if size > 1 else torch_distributed.ReduceOp.SUM
    )
    compare("mean", average, [total / size])
    root = ranks(rank + 1)
    torch_distributed.reduce(root, dst=0)
    compare("reduce", root, [total if rank == 0 else rank + 1])
    sent = ranks(rank, 7)
    torch_distributed.broadcast(sent, src=size - 1)
    compare("broadcast", sent, [size - 1, 7])
    gathered = torch.empty(2 * size, device=device)
    torch_distributed.all_gather_into_tensor(gathered, ranks(rank, -rank))
    compare("all-gather into one tensor", gathered, [sign * r for r in range(size) for sign in (1, -1)])
    parts = [torch.empty(1, device=device) for _ in range(size)]
    torch_distributed.all_gather(parts, ranks(rank))
    compare("all-gather", torch.cat(parts), list(range(size)))
    scattered = torch.empty(1, device=device)
    torch_distributed.reduce_scatter_tensor(scattered, ranks(*range(size)))
    compare("reduce-scatter", scattered, [rank * size])
    # Rank r sends r + 1 rows to each peer but none to rank 0.
    outgoing = [0] + [rank + 1] * (size - 1)
    incoming = [0] * size if rank == 0 else list(range(1, size + 1))
    rows = torch.full((sum(outgoing), 3), float(rank), device=device)
    arrived = rows.new_empty(sum(incoming), 3)
    torch_distributed.all_to_all_single(arrived, rows, incoming, outgoing)
    compare("all-to-all", arrived, [float(r) for r, n in enumerate(incoming) for _ in range(3 * n)])
    works: list[Any] = []
    box = torch.empty(2, device=device)
    if size > 1:
        works.append(torch_distributed.irecv(box, (rank - 1) % size))
        works.append(torch_distributed.isend(ranks(rank, 1), (rank + 1) % size))
    for work in works:
        if work is not None:
            work.wait()
    compare("messages around", box if size > 1 else ranks(0, 1), [(rank - 1) % size, 1])
    said = groups.from_rank_zero({"rank": rank, "text": "ä"})
    found["object from rank 0"] = 0.0 if said == {"rank": 0, "text": "ä"} else 1.0
    groups.barrier()
    return {"differences": found, "device": device.type, "log": staged_backend.take_log()}


def parity(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The suite's own layouts against its reference, with what was issued meanwhile and the pipelines' idle shares."""
    staged_backend.take_log()
    idle: list[float] = []
    train_step = TrainingEngine.train_step

    def noting(self: TrainingEngine, *args: Any, **kwargs: Any) -> StepResult:
        result = train_step(self, *args, **kwargs)
        idle.extend(value for name, value in result.pipeline.items() if name == "pipeline/idle_share")
        return result

    with patch.object(TrainingEngine, "train_step", noting):
        results = layouts(cases)
    return {"layouts": results, "log": staged_backend.take_log(), "idle": idle}


def losses(cases: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Losses of some steps of each case, and what was issued."""
    staged_backend.take_log()
    found = []
    for case in cases:
        with opened(case) as (engine, groups):
            own = []
            for step in range(steps):
                batches, loops = own_batches(step % len(LOOPS), 2, groups), LOOPS[step % len(LOOPS)]
                own.append(engine.train_step(batches, n_loops=loops, n_grad_loops=2, lr=3e-3).loss)
        found.append(own)
    return {"losses": found, "log": staged_backend.take_log()}


def gradients(case: dict[str, Any]) -> dict[str, Any]:
    """The whole gradients of one step, and the types in which they were reduced."""
    staged_backend.take_log()
    kept: list[Tensor] = []
    with opened(case) as (engine, groups):

        def keep(loss: float) -> None:
            for parameter in engine.module.parameters():
                whole = engine.gradient(parameter)
                kept.append(torch.zeros(1) if whole is None else whole.detach().double().cpu().flatten())

        engine.train_step(own_batches(0, 2, groups), n_loops=3, n_grad_loops=2, lr=1e-3, after_backward=keep)
    log = staged_backend.take_log()
    types = sorted({entry["dtype"] for entry in log if entry["kind"] == "reduce_scatter"})
    return {"gradient": torch.cat(kept), "types": types, "log": log}


def gradient_types(case: dict[str, Any]) -> dict[str, Any]:
    """Gradients that were averaged in bf16 and in fp32, compared; and the types that went over the wire."""
    made = {
        name: gradients({**case, "dtype": "bfloat16", "deepspeed": {"communication_data_type": name}})
        for name in ("bf16", "fp32")
    }
    exact = made["fp32"]["gradient"]
    difference = ((made["bf16"]["gradient"] - exact).norm() / exact.norm()).item()
    return {
        "difference": difference,
        "types": {name: own["types"] for name, own in made.items()},
        "log": made["bf16"]["log"] + made["fp32"]["log"],
    }
