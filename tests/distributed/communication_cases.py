"""What runs inside the processes of test_communication.py."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from mythos_ds.bench.collective_bytes import CollectiveBytes
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.parallel.routing_stats import StepRecords
from tests.distributed.cases import numel, opened, own_batches, own_experts
from tests.helpers.perturbed_recompute import perturbed_recompute

LARGE_MODEL = {
    "zero_optimization": {
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_param_persistence_threshold": 0,
    }
}
"""Keeps DeepSpeed from holding a toy model whole: it then gathers as it would a model of any size."""


def gathered_and_exchanged(loops: list[int], grad_loops: int | None, checkpointing: list[str]) -> list[dict[str, Any]]:
    """Bytes of one training step for each (checkpointing, loop count), after a first step at another depth."""
    return _measure(CollectiveBytes(), loops, grad_loops, checkpointing)


def bytes_and_counts(loops: list[int], grad_loops: list[int | None]) -> dict[str, Any]:
    """Everything of two ranks, in one launch; `bytes` has one list per entry of `grad_loops`."""
    traffic, modes = CollectiveBytes(), ["layer", "loop", "none"]
    return {
        "bytes": [_measure(traffic, loops, grad, modes) for grad in grad_loops],
        "counts": expert_counts(modes),
        "perturbed": [perturbed(mode) for mode in modes[:2]],
    }


def _measure(
    traffic: CollectiveBytes, loops: list[int], grad_loops: int | None, checkpointing: list[str]
) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for mode in checkpointing:
        case = {"ep": 2, "stage": 3, "accumulation": 1, "checkpointing": mode, "deepspeed": LARGE_MODEL}
        with opened(case) as (engine, groups):
            batches = own_batches(0, 1, groups)
            engine.train_step(batches, n_loops=2, n_grad_loops=2, lr=1e-3)
            for n_loops in loops:
                traffic.take()
                engine.train_step(batches, n_loops=n_loops, n_grad_loops=grad_loops or n_loops, lr=1e-3)
                counted = traffic.take()
                out.append({"checkpointing": mode, "n_loops": n_loops, "bytes": counted})
            model = engine.module
            whole, local_experts = (4 * numel(each) for each in (model.parameters(), own_experts(model)))
    for entry in out:
        entry.update(dense_bytes=whole - local_experts, expert_bytes=local_experts)
    return out


def _noting(notes: list[ForwardRecords]) -> Callable[[StepRecords, ForwardRecords], None]:
    """StepRecords.add, which also puts what it reads into `notes`."""
    add = StepRecords.add

    def noting(self: StepRecords, records: ForwardRecords) -> None:
        notes.append(records)
        add(self, records)

    return noting


def expert_counts(checkpointing: list[str], **setting: Any) -> list[dict[str, Any]]:
    """Tokens per loop and expert, and the router biases, of one training step of 5 loops with 2 for the gradient; loss
    and gradient norm of it and of the one before. setting: of the case."""
    out = []
    notes: list[ForwardRecords] = []
    for mode in checkpointing:
        case = {"ep": 2, "stage": 3, "checkpointing": mode, **setting}
        with opened(case) as (engine, groups), patch.object(StepRecords, "add", _noting(notes)):
            steps = [
                engine.train_step(own_batches(step, 2, groups), n_loops=5, n_grad_loops=2, lr=1e-2) for step in range(2)
            ]
            layers, routing = engine.module.moe_layers(), notes[-1].routing
            out.append(
                {
                    "steps": [[step.loss, step.grad_norm] for step in steps],
                    "counts": [[own[loop].counts.tolist() for loop in range(5)] for own in routing.values()],
                    "biases": [
                        layer.router.bias.tolist() + layer.router.loop_bias.flatten().tolist() for layer in layers
                    ],
                }
            )
    return out


def perturbed(checkpointing: str) -> dict[str, Any]:
    """Two training steps whose recomputes see other inputs than their forwards did: choices that they made otherwise,
    how many they were, and the last gradient norm."""
    with (
        opened({"ep": 2, "stage": 3, "accumulation": 1, "checkpointing": checkpointing}) as (engine, groups),
        perturbed_recompute(engine.module, 1.0, groups.rank) as choices,
    ):
        for step in range(2):
            result = engine.train_step(own_batches(step, 1, groups), n_loops=3, n_grad_loops=2, lr=1e-3)
    return {"changed": choices.changed(), "recomputed": len(choices.recompute), "grad_norm": result.grad_norm}
