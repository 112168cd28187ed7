"""What runs inside the processes of test_pipeline.py and test_pipeline_guards.py."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from mythos_ds.bench.collective_bytes import CollectiveBytes
from mythos_ds.costs.pipeline import predict
from mythos_ds.engine import pipelined_step
from mythos_ds.engine import training_engine as engine_module
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.moe import MoE
from mythos_ds.parallel.pipeline_executor import Pipeline, PipelineRun
from mythos_ds.parallel.routing_stats import StepRecords, update_biases
from tests.distributed.cases import (
    GRAD_LOOPS,
    LOOPS,
    full_weights_of_stage,
    global_batches,
    layouts,
    non_finite_norm,
    numel,
    opened,
    own_batches,
    own_experts,
)

RING = {"ep": 2, "stage": 3, "pp": 2, "optimizer": "sgd", "checkpointing": "loop"}
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1}}
"""Smaller than any parameter, as a bucket is in a large model."""


def no_reduction_at_the_end(self: DeepSpeedEngine) -> contextlib.AbstractContextManager:
    """Instead of `coalesce_grad_reduction`: gradients are reduced when DeepSpeed's own hooks say so."""
    return contextlib.nullcontext()


def numbered_within_the_stage(original: Callable[..., None]) -> Callable[..., None]:
    """StepRecords.add with the layers of each stage numbered from 0: the sum over all ranks then mixes stages."""

    def add(self: StepRecords, records: ForwardRecords) -> None:
        for number, layer in enumerate(sorted(records.routing)):
            records.routing[number] = records.routing.pop(layer)
        original(self, records)

    return add


def adding_up(original: Callable[..., None]) -> Callable[..., None]:
    """MoE._record that adds to what is there, as a counter in the forward would."""

    def record(self: MoE, records: ForwardRecords, loop: int, *rest: Any) -> None:
        before = records.routing[self.layer].pop(loop, None)
        original(self, records, loop, *rest)
        if before is not None:
            again = records.routing[self.layer][loop]
            records.routing[self.layer][loop] = replace(again, counts=before.counts + again.counts)

    return record


def guards() -> dict[str, Any]:
    """Deviations from the reference with one safeguard taken away at a time, and the tokens that were counted."""
    accumulate = patch.object(MoE, "_record", adding_up(MoE._record))
    arrangements: dict[str, list[Any]] = {
        "as it is": [],
        "layers numbered within the stage": [
            patch.object(StepRecords, "add", numbered_within_the_stage(StepRecords.add))
        ],
        "counters in the forward": [accumulate],
        "counters in the forward, records left open": [
            accumulate,
            patch.object(ForwardRecords, "close", lambda self: None),
        ],
        "without the norm over stages": [patch.object(pipelined_step, "couple_gradient_norm", lambda *_: None)],
    }
    return {name: _guarded(patches) for name, patches in arrangements.items()}


def _guarded(patches: list[Any]) -> dict[str, Any]:
    counted: list[float] = []

    def noting(layers: list[MoE], counts: Tensor, rate: float) -> None:
        counted.append(counts.sum().item())
        update_biases(layers, counts, rate)

    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.enter_context(patch.object(engine_module, "update_biases", noting))
        found = layouts([{**RING, "deepspeed": SMALL_BUCKETS}])[0]
    return {**found, "counted": counted}


def without_coalescing() -> dict[str, Any]:
    """Deviations where each backward reduces its gradients by itself."""
    with patch.object(DeepSpeedEngine, "coalesce_grad_reduction", no_reduction_at_the_end):
        return layouts([{**RING, "deepspeed": SMALL_BUCKETS}])[0]


def with_module_hooks() -> dict[str, Any]:
    """Deviations where DeepSpeed's module hooks stay."""
    with patch.object(pipelined_step, "remove_module_hooks", lambda *_: None):
        return layouts([RING])[0]


def traffic(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each case ("loops": loop counts) what one optimizer step sent, reduced and held, by loop count;
    after a first step at another depth."""
    counter = CollectiveBytes()
    passes: Counter[str] = Counter()
    reduce_once = DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue

    def counted(self: DeepSpeedZeroOptimizer_Stage3) -> None:
        passes["reduce"] += 1
        reduce_once(self)

    with patch.object(DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue", counted):
        return [_traffic(case, counter, passes) for case in cases]


def _traffic(case: dict[str, Any], counter: CollectiveBytes, passes: Counter[str]) -> list[dict[str, Any]]:
    out = []
    runs: list[PipelineRun] = []
    train = Pipeline.train

    def watched(self: Pipeline, *args: Any, **kwargs: Any) -> PipelineRun:
        runs.append(train(self, *args, **kwargs))
        return runs[-1]

    with opened(case) as (engine, groups), patch.object(Pipeline, "train", watched):
        batches = own_batches(0, case["accumulation"], groups)
        engine.train_step(batches, n_loops=2, n_grad_loops=2, lr=1e-3)
        for n_loops in case["loops"]:
            counter.take()
            passes.clear()
            engine.train_step(batches, n_loops=n_loops, n_grad_loops=GRAD_LOOPS, lr=1e-3)
            prediction = predict(engine.resolved, n_loops)
            out.append(
                {
                    "n_loops": n_loops,
                    "stage": groups.layout.stage,
                    "bytes": counter.take(),
                    "reduce_passes": passes["reduce"],
                    "held": runs[-1].peak_held,
                    "predicted_sent": prediction.sent_bytes[groups.layout.stage],
                    "predicted_held": prediction.peak_held[groups.layout.stage],
                    "stage_bytes": numel(engine.module.parameters()) * 4,
                    "own_expert_bytes": numel(own_experts(engine.module)) * 4,
                }
            )
    return out


def special_cases() -> dict[str, Any]:
    """The cases below, in one launch. Those without pipeline come first: DeepSpeed numbers modules per process, and
    compares the numbers over all ranks there."""
    plain_losses, plain_outputs = _four_losses({"ep": 2, "stage": 3, "dtype": "bfloat16"})[0], _outputs({})
    return {
        "precisions": other_precisions(plain_losses),
        "inference": inference(plain_outputs),
        "tied_copies": tied_copies(),
        "made": what_is_made(),
        "skipped": non_finite_norm(RING),
    }


def _four_losses(case: dict[str, Any]) -> tuple[list[float], list[str], list[str]]:
    """Losses of four steps, and the dtypes of buffers and of gradients as they gather."""
    gradients: set[str] = set()
    run = Pipeline.train

    def watched(self: Pipeline, *args: Any, **kwargs: Any) -> PipelineRun:
        result = run(self, *args, **kwargs)
        gradients.update(str(p.grad.dtype) for p in self.model.parameters() if p.grad is not None)
        return result

    with opened(case) as (engine, groups):
        batches = [own_batches(step, case.get("accumulation", 2), groups) for step in range(len(LOOPS))]
        with patch.object(Pipeline, "train", watched):
            losses = [
                engine.train_step(own, n_loops=loops, n_grad_loops=2, lr=3e-3).loss
                for own, loops in zip(batches, LOOPS, strict=True)
            ]
        buffers = sorted({str(buffer.dtype) for buffer in engine.module.buffers()})
    return losses, buffers, sorted(gradients)


def other_precisions(plain: list[float]) -> dict[str, Any]:
    """Losses in bf16 with and without pipeline and in fp32; dtypes of the ring's buffers and gradients in bf16."""
    ring, buffers, gradients = _four_losses({"ep": 2, "stage": 3, "pp": 2, "dtype": "bfloat16"})
    literal, *_ = _four_losses({"ep": 2, "stage": 3, "pp": [1, 2, 1], "accumulation": 4, "dtype": "bfloat16"})
    float32, *_ = _four_losses({"ep": 2, "stage": 3, "pp": 2})
    losses = {"plain": plain, "ring": ring, "literal": literal, "float32": float32}
    return {"losses": losses, "buffers": buffers, "gradients": gradients}


def _outputs(layout: dict[str, Any]) -> tuple[list[float], Tensor]:
    """Evaluation losses at two depths, and logits."""
    case = {"ep": 2, "stage": 3, **layout}
    with opened(case) as (engine, groups):
        losses = [engine.eval_loss(own_batches(0, case.get("accumulation", 2), groups), loops) for loops in (1, 9)]
        tokens = global_batches(3, 2)[0]["tokens"][:1, :7]
        return losses, engine.logits(tokens, 3)


def inference(plain: tuple[list[float], Tensor]) -> dict[str, float]:
    """Evaluation losses and logits of pipelines: largest deviations from those without."""
    losses, logits = plain
    others = [_outputs({"pp": 2}), _outputs({"pp": [1, 2, 1], "accumulation": 4})]
    return {
        "loss": max(abs(a - b) for other, _ in others for a, b in zip(losses, other, strict=True)),
        "logits": max((logits - other).abs().max().item() for _, other in others),
    }


def tied_copies() -> float:
    """Largest difference between the two copies of a tied embedding after training."""
    with opened({**RING, "optimizer": "adamw", "model": {"tie_embeddings": True}}) as (engine, groups):
        for step, loops in enumerate(LOOPS):
            engine.train_step(own_batches(step, 2, groups), n_loops=loops, n_grad_loops=2, lr=3e-3)
        own = full_weights_of_stage(engine, groups)["embed.weight"]
        copies = [torch.empty_like(own) for _ in range(groups.world_size)]
        torch.distributed.all_gather(copies, own)
        return max((copy - own).abs().max().item() for copy in copies)


def what_is_made() -> dict[str, Any]:
    """What a rank's module holds, from the parameters it was built with."""
    with opened(RING) as (engine, groups):
        sizes = {name: numel([parameter]) for name, parameter in engine.module.named_parameters()}
        return {
            "stage": groups.layout.stage,
            "recurrent": len({name.split(".")[2] for name in sizes if name.startswith("recurrent.layers.")}),
            "experts": sum(size for name, size in sizes.items() if ".experts." in name),
            "embed": any(name.startswith("embed.") for name in sizes),
            "lm_head": any(name.startswith("lm_head.") for name in sizes),
        }
