"""One optimizer step over micro-batches, and evaluation, on top of a DeepSpeed engine."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.engine.optimizer import set_learning_rate
from mythos_ds.errors import NumericsError
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.mythos import MythosModel, clear_records
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.routing_sync import Statistics, StepRecords, largest_bias, update_biases

Batch = dict[str, Tensor]
"""tokens, labels, positions: int64 [micro_batch, seq]; labels are the next tokens."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on all ranks."""

    loss: float
    """Mean cross-entropy over the global batch, averaged in float64."""
    grad_norm: float
    """Global gradient norm before clipping."""
    routing: Statistics
    """Metrics of the routers and the carried state."""


class TrainingEngine:
    """Trains and evaluates a sharded model.

    Every method is collective: all ranks call it with the same arguments, except for the batches.
    """

    def __init__(self, engine: Any, resolved: ResolvedRun, groups: ParallelGroups):
        self.deepspeed = engine
        self.resolved = resolved
        self.groups = groups
        training = resolved.config.training
        self._aux = AuxLoss(
            balance=training.balance_loss,
            z=training.z_loss,
            ponder=training.ponder_cost,
            # DeepSpeed divides the loss by the accumulation steps, but these gradients do not pass through the loss.
            scale=1.0 / resolved.gradient_accumulation_steps,
        )

    @property
    def module(self) -> MythosModel:
        """The model. Under ZeRO-3 its parameters are empty outside of a forward."""
        return self.deepspeed.module

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        n_loops: int,
        n_grad_loops: int,
        lr: float,
        statistics: bool = True,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; n_loops loops, the last n_grad_loops with gradient.

        lr: the scheduled learning rate, before each group's own factor. statistics: also collect the costlier metrics
        (shares before the bias, entropy, overlap, state). Errors: NumericsError on every rank where the loss or the
        gradient norm is not finite, with the weights as they were for the loss; ValueError for a wrong batch count.
        """
        if len(batches) != self.resolved.gradient_accumulation_steps:
            raise ValueError(f"{len(batches)} micro-batches, but {self.resolved.gradient_accumulation_steps} per step")
        self.deepspeed.train()
        self._track(statistics)
        set_learning_rate(self.deepspeed.optimizer, lr)
        records, losses = StepRecords(), []
        for index, batch in enumerate(batches):
            clear_records(self.module)
            loss = self._forward(batch, n_loops, n_grad_loops=n_grad_loops, aux=self._aux)
            self.deepspeed.backward(loss)
            records.add(self.module)
            losses.append(loss.detach().double())
            if index < len(batches) - 1:
                self.deepspeed.step()
        mean_loss = self._global_mean(torch.stack(losses))
        if not math.isfinite(mean_loss):
            raise NumericsError(
                f"loss is {mean_loss} at {n_loops} loops, learning rate {lr}; the step was not applied."
            )
        grad_norm = self._optimizer_step()
        if not math.isfinite(grad_norm):
            raise NumericsError(
                f"gradient norm is {grad_norm} (loss {mean_loss}) at {n_loops} loops, learning rate {lr}."
            )
        return StepResult(mean_loss, grad_norm, self._finish_routing(records))

    def eval_loss(self, batch: Batch, n_loops: int) -> float:
        """Mean cross-entropy over all ranks' batches (of one shape) at any loop count, in float64."""
        with self._evaluating():
            loss = self._forward(batch, n_loops)
        return self._global_mean(loss.double()[None])

    def logits(self, tokens: Tensor, n_loops: int, positions: Tensor | None = None) -> Tensor:
        """fp32 [batch, seq, vocab] for this rank's tokens int64 [batch, seq]; one loop count on all ranks."""
        with self._evaluating():
            device = self.groups.device
            moved = None if positions is None else positions.to(device)
            return self.deepspeed(tokens.to(device), n_loops=n_loops, positions=moved)

    def _forward(self, batch: Batch, n_loops: int, **options: Any) -> Tensor:
        tensors = {
            name: batch[name].to(self.groups.device, non_blocking=True) for name in ("tokens", "labels", "positions")
        }
        return self.deepspeed(
            tensors["tokens"], labels=tensors["labels"], positions=tensors["positions"], n_loops=n_loops, **options
        )

    def _global_mean(self, values: Tensor) -> float:
        total = self.groups.all_reduce(values.sum())
        return total.item() / (values.numel() * self.groups.dp_size)

    def _optimizer_step(self) -> float:
        """Clips and steps; returns the gradient norm before clipping."""
        config = self.resolved.config
        if config.parallel.zero_stage == 0 and config.training.dtype == "float32":
            norm = self._replicated_grad_norm()
            self.deepspeed.step()
            return norm.item()
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def _replicated_grad_norm(self) -> Tensor:
        """ZeRO 0 in fp32: DeepSpeed clips with torch's function and keeps no norm. Gradients are whole on each rank."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))

    def _finish_routing(self, records: StepRecords) -> Statistics:
        records.reduce(self.groups)
        update_biases(self.module, records.counts, self.resolved.router_bias_rate)
        return {**records.statistics(self.groups.dp_size), "router/bias_abs_max": largest_bias(self.module)}

    def _track(self, details: bool) -> None:
        self.module.recurrent.track_loops = details
        for layer in self.module.moe_layers():
            layer.record_details = details

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.deepspeed.training
        self.deepspeed.eval()
        self._track(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train(was_training)
