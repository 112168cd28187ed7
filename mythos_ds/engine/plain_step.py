"""Forward and backward of a step's micro-batches, without pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mythos_ds.data.batches import Batch
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pipeline_executor import PipelineRun


@dataclass(frozen=True)
class StepRun:
    """Forward and backward of a step's micro-batches, before the optimizer."""

    loss: float
    """Mean cross-entropy over the global batch, averaged in float64; the same on all ranks."""
    records: list[ForwardRecords]
    """Per micro-batch, of the layers on this process."""
    pipeline: PipelineRun | None = None
    """What a pipeline noted on this process."""


class PlainStep:
    """Runs one micro-batch after the other; DeepSpeed accumulates their gradients."""

    def __init__(self, engine: Any, groups: ParallelGroups):
        self._deepspeed, self._groups = engine, groups

    def train(
        self, batches: Sequence[Batch], *, n_loops: int, n_grad_loops: int, aux: AuxLoss, details: bool
    ) -> StepRun:
        """Forward and backward of all micro-batches; the last n_grad_loops of n_loops loops carry gradient. After it
        one `step` of the DeepSpeed engine is due."""
        losses, notes = [], []
        for index, batch in enumerate(batches):
            records = ForwardRecords(details=details)
            loss = self._forward(batch, n_loops, n_grad_loops=n_grad_loops, aux=aux, records=records)
            self._deepspeed.backward(loss)
            notes.append(records)
            losses.append(loss.detach().double())
            if index < len(batches) - 1:
                self._deepspeed.step()
        return StepRun(self._mean(losses), notes)

    def losses(self, batches: Sequence[Batch], n_loops: int) -> float:
        """Mean cross-entropy over all ranks' batches (of one shape), in float64."""
        return self._mean([self._forward(batch, n_loops).double() for batch in batches])

    def logits(self, batch: Batch, n_loops: int) -> Tensor:
        """fp32 [rows, seq, vocab] for `tokens` (and `positions`, if given). All ranks give the same tokens."""
        return self._deepspeed(batch["tokens"], n_loops=n_loops, positions=batch.get("positions"))

    def _forward(self, batch: Batch, n_loops: int, **options: Any) -> Tensor:
        inputs = {name: batch.get(name) for name in ("targets", "positions", "depths")}
        return self._deepspeed(batch["tokens"], n_loops=n_loops, **inputs, **options)

    def _mean(self, losses: list[Tensor]) -> float:
        total = self._groups.all_reduce(torch.stack(losses).sum())
        return total.item() / (len(losses) * self._groups.layout.dp_size)
