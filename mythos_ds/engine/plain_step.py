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


def counted_targets(batches: Sequence[Batch], groups: ParallelGroups) -> float | None:
    """The targets that count in these micro-batches of all ranks; None where all do. Collective."""
    if not batches or "counted" not in batches[0]:
        return None
    own = torch.stack([batch["counted"].sum() for batch in batches]).sum().double().to(groups.device)
    if not groups.layout.is_last_stage:  # the other stages of a pipeline have the rows of the same micro-batches
        own = torch.zeros_like(own)
    return groups.all_reduce(own).item()


def loss_divisor(batches: Sequence[Batch], groups: ParallelGroups) -> float | None:
    """What each rank divides the summed losses of each micro-batch by, so that the mean of all of them is the mean over
    the targets that count; None where all do. Collective."""
    counted = counted_targets(batches, groups)
    return None if counted is None else max(counted, 1.0) / (len(batches) * groups.layout.stage_sizes[-1])


class PlainStep:
    """Runs one micro-batch after the other; DeepSpeed accumulates their gradients."""

    def __init__(self, engine: Any, groups: ParallelGroups):
        self._deepspeed, self._groups = engine, groups

    def train(
        self, batches: Sequence[Batch], *, n_loops: int, n_grad_loops: int, aux: AuxLoss, details: bool
    ) -> StepRun:
        """Forward and backward of all micro-batches; the last n_grad_loops of n_loops loops carry gradient. After it
        one `step` of the DeepSpeed engine is due."""
        losses, notes, divisor = [], [], loss_divisor(batches, self._groups)
        for index, batch in enumerate(batches):
            records = ForwardRecords(details=details)
            options = {"n_grad_loops": n_grad_loops, "aux": aux, "records": records, "loss_divisor": divisor}
            loss = self._forward(batch, n_loops, **options)
            self._deepspeed.backward(loss)
            notes.append(records)
            losses.append(loss.detach().double())
            if index < len(batches) - 1:
                self._deepspeed.step()
        return StepRun(self._mean(losses), notes)

    def losses(self, batches: Sequence[Batch], n_loops: int) -> float:
        """Mean cross-entropy over all ranks' batches (of one shape), in float64."""
        divisor = loss_divisor(batches, self._groups)
        return self._mean([self._forward(batch, n_loops, loss_divisor=divisor).double() for batch in batches])

    def logits(self, batch: Batch, n_loops: int) -> Tensor:
        """fp32 [rows, seq, vocab] for `tokens` (and `positions`, if given). All ranks give the same tokens."""
        return self._deepspeed(batch["tokens"], n_loops=n_loops, positions=batch.get("positions"))

    def _forward(self, batch: Batch, n_loops: int, **options: Any) -> Tensor:
        inputs = {name: batch.get(name) for name in ("targets", "positions", "depths")}
        return self._deepspeed(batch["tokens"], n_loops=n_loops, **inputs, **options)

    def _mean(self, losses: list[Tensor]) -> float:
        total = self._groups.all_reduce(torch.stack(losses).sum())
        return total.item() / (len(losses) * self._groups.layout.dp_size)
