"""Forward and backward of a step's micro-batches through a pipeline.

Each process has one ordinary ZeRO-3 engine, confined to its stage. The stage's weights are gathered once, the schedule
runs over all virtual stages and micro-batches while gradients add up locally, and leaving DeepSpeed's
`coalesce_grad_reduction` reduces them once.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.data.batches import Batch
from mythos_ds.engine.deepspeed_patches import DuplicateNorm, couple_gradient_norm, remove_module_hooks
from mythos_ds.engine.plain_step import StepRun, loss_divisor
from mythos_ds.errors import ParallelError
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.pipeline_stage import StageModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pipeline_executor import Pipeline


class PipelinedStep:
    """Runs a step's micro-batches through all stages; see `PlainStep` for the methods."""

    def __init__(self, engine: Any, resolved: ResolvedRun, groups: ParallelGroups):
        self._deepspeed, self._groups = engine, groups
        dtype = torch.bfloat16 if resolved.config.training.dtype == "bfloat16" else torch.float32
        self._model = cast(StageModel, engine.module)
        self._pipeline = Pipeline(self._model, groups, resolved.stages, dtype)
        self._parameters = list(self._model.parameters())
        self._duplicate = DuplicateNorm()
        self._tied = groups.tie_group is not None
        remove_module_hooks(engine.optimizer)
        couple_gradient_norm(engine.optimizer, groups, self._duplicate)

    def train(
        self, batches: Sequence[Batch], *, n_loops: int, n_grad_loops: int, aux: AuxLoss, details: bool
    ) -> StepRun:
        divisor = loss_divisor(batches, self._groups)
        with self._deepspeed.coalesce_grad_reduction():
            with deepspeed.zero.GatheredParameters(self._parameters):
                run = self._pipeline.train(
                    batches,
                    n_loops=n_loops,
                    n_grad_loops=n_grad_loops,
                    aux=aux,
                    details=details,
                    loss_divisor=divisor,
                )
            if self._tied:
                self._share_tied_gradient()
        return StepRun(self._mean(run.outputs, len(batches)), run.records, run)

    def losses(self, batches: Sequence[Batch], n_loops: int) -> float:
        divisor = loss_divisor(batches, self._groups)
        with deepspeed.zero.GatheredParameters(self._parameters):
            outputs = self._pipeline.evaluate(batches, n_loops, divisor)
        return self._mean(outputs, len(batches))

    def logits(self, batch: Batch, n_loops: int) -> Tensor:
        # Stages of different size cut a micro-batch differently: it needs a row for each process of any stage.
        layout, rows = self._groups.layout, batch["tokens"].shape[0]
        copies = math.lcm(*layout.stage_sizes) // layout.dp_size
        batch = {name: tensor.repeat(copies, 1) for name, tensor in batch.items()}
        with deepspeed.zero.GatheredParameters(self._parameters):
            outputs = self._pipeline.evaluate([batch], n_loops)
        return self._from_last_stage([output[:rows] for output in outputs], batch["tokens"][:rows])

    def _mean(self, losses: list[Tensor], n_micro_batches: int) -> float:
        """The mean of the last stage's losses, on every rank."""
        own = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64)
        total = self._groups.all_reduce(own.to(self._groups.device))
        return total.item() / (n_micro_batches * self._groups.layout.stage_sizes[-1])

    def _from_last_stage(self, outputs: list[Tensor], tokens: Tensor) -> Tensor:
        """Every rank gets the logits of the last stage's first process: all were asked the same."""
        shape = (*tokens.shape, self._model.config.vocab_size)
        source = self._groups.layout.ranks_of(-1).start
        if outputs and self._groups.rank == source:
            logits = outputs[0].contiguous()
        else:
            logits = torch.empty(shape, device=self._groups.device)
        torch_distributed.broadcast(logits, source)
        return logits

    def _share_tied_gradient(self) -> None:
        """The embedding's gradient is what the first and the last stage found, each averaged over its processes."""
        weight = self._model.embed.weight
        if weight.grad is None:
            raise ParallelError("the tied embedding has no gradient")
        weight.grad.div_(self._groups.layout.dp_size)
        torch_distributed.all_reduce(weight.grad, group=self._groups.tie_group)
        last = self._groups.layout.is_last_stage
        self._duplicate.square = weight.grad.double().square().sum().item() if last else 0.0
