"""One optimizer step over micro-batches, and evaluation, on top of a DeepSpeed engine."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.data.batches import Batch
from mythos_ds.engine.compilation import end_compilation
from mythos_ds.engine.deepspeed_patches import forget_models
from mythos_ds.engine.optimizer import set_learning_rate
from mythos_ds.engine.pipelined_step import PipelinedStep
from mythos_ds.engine.plain_step import PlainStep, counted_targets
from mythos_ds.errors import NumericsError
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pipeline_executor import PipelineRun
from mythos_ds.parallel.routing_stats import Statistics, StepRecords, largest_bias, update_biases


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on all ranks."""

    loss: float
    """Mean cross-entropy over the targets of the global batch that count, averaged in float64."""
    grad_norm: float
    """Global gradient norm before clipping."""
    routing: Statistics
    """Metrics of the routers and the carried state."""
    pipeline: dict[str, float] = field(default_factory=dict)
    """With a pipeline and statistics: the mean idle share of the processes, and the most (virtual stage, micro-batch)
    pairs that any held for their backward at once."""


class TrainingEngine:
    """Trains and evaluates a sharded model.

    Every method is collective: all ranks call it with the same arguments, except for the batches. With a pipeline, the
    ranks of different stages get the rows of the same micro-batches.
    """

    def __init__(self, engine: Any, resolved: ResolvedRun, groups: ParallelGroups):
        self.deepspeed = engine
        self.resolved = resolved
        self.groups = groups
        training = resolved.config.training
        self._step: PlainStep | PipelinedStep = (
            PipelinedStep(engine, resolved, groups) if groups.pipelined else PlainStep(engine, groups)
        )
        self._micro_batches = resolved.gradient_accumulation_steps
        self._aux = AuxLoss(
            balance=training.balance_loss,
            z=training.z_loss,
            ponder=training.ponder_cost,
            # The loss is divided by the number of micro-batches, but these gradients do not pass through the loss.
            scale=1.0 / resolved.gradient_accumulation_steps,
        )

    def close(self) -> None:
        """Let go of what DeepSpeed holds beyond the engine's own life, so that another one can follow."""
        self.deepspeed.destroy()
        forget_models()
        end_compilation()

    @property
    def module(self) -> MythosModel:
        """The model, or this stage's part of it. Under ZeRO-3 its parameters are empty outside of a forward."""
        return self.deepspeed.module

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        n_loops: int,
        n_grad_loops: int,
        lr: float,
        statistics: bool = True,
        after_backward: Callable[[float], None] = lambda loss: None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; n_loops loops, the last n_grad_loops with gradient.

        Where batches have `depths`, n_loops is their maximum over the global batch. lr: the scheduled learning rate,
        before each group's own factor. statistics: also collect the costlier metrics (shares before the bias, entropy,
        overlap, state). after_backward: gets the step's loss while its gradients can be read (`gradient`). Errors:
        NumericsError on every rank where the loss or the gradient norm is not finite, with the weights as they were for
        the loss; ValueError for a wrong batch count, and for depths outside of 1 .. n_loops or with a pipeline.
        """
        self._accumulate(len(batches))
        for depths in (batch["depths"] for batch in batches if "depths" in batch):
            if self.groups.pipelined or depths.min() < 1 or depths.max() > n_loops:
                raise ValueError(f"depths {depths.tolist()} with {n_loops} loops; allowed: 1 .. n_loops, no pipeline")
        self.deepspeed.train()
        set_learning_rate(self.deepspeed.optimizer, lr)
        run = self._step.train(
            [self._on_device(batch) for batch in batches],
            n_loops=n_loops,
            n_grad_loops=n_grad_loops,
            aux=self._aux,
            details=statistics,
        )
        after_backward(run.loss)
        if not math.isfinite(run.loss):
            raise NumericsError(
                f"loss is {run.loss} at {n_loops} loops, learning rate {lr}; the step was not applied.",
                loss=run.loss,
                code="MDS801",
            )
        grad_norm = self._optimizer_step()
        if not math.isfinite(grad_norm):
            raise NumericsError(
                f"gradient norm is {grad_norm} (loss {run.loss}) at {n_loops} loops, learning rate {lr}.",
                loss=run.loss,
                grad_norm=grad_norm,
                code="MDS802",
            )
        routing = self._finish_routing(run.records, n_loops, statistics)
        pipeline = self._pipeline_metrics(run.pipeline) if statistics and run.pipeline is not None else {}
        return StepResult(run.loss, grad_norm, routing, pipeline)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of one of `module`'s parameters, whole, averaged and before clipping; None where it has none.

        To be called in `train_step`'s after_backward. Collective over the ranks that hold the parameter.
        """
        return safe_get_full_grad(parameter)

    def counted_targets(self, batches: Sequence[Batch]) -> float | None:
        """How many targets of all ranks' batches count in their loss; None where all do."""
        return counted_targets(batches, self.groups)

    def eval_loss(self, batches: Sequence[Batch], n_loops: int) -> float:
        """Mean cross-entropy over the targets of all ranks' batches (of one shape) that count, at any loop count, in
        float64."""
        with self._evaluating():
            return self._step.losses([self._on_device(batch) for batch in batches], n_loops)

    def logits(self, tokens: Tensor, n_loops: int, positions: Tensor | None = None) -> Tensor:
        """fp32 [batch, seq, vocab] for tokens int64 [batch, seq]; one loop count on all ranks, and with a pipeline the
        same tokens."""
        batch = {"tokens": tokens} if positions is None else {"tokens": tokens, "positions": positions}
        with self._evaluating():
            return self._step.logits(self._on_device(batch), n_loops)

    def _accumulate(self, micro_batches: int) -> None:
        """Divide losses by the number of micro-batches of this step. Raises ValueError for one that no step has."""
        if micro_batches == self._micro_batches:
            return
        per_step = self.resolved.gradient_accumulation_steps
        training = self.resolved.config.training
        sizes = BatchSchedule.of(training).sizes()
        if micro_batches not in [per_step * size // training.global_batch_size for size in sizes]:
            raise ValueError(f"{micro_batches} micro-batches, but {per_step} per step")
        self._micro_batches = micro_batches
        self._aux = replace(self._aux, scale=1.0 / micro_batches)
        if not self.groups.pipelined:  # which divides by itself
            engine = self.deepspeed
            unit = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
            engine.set_train_batch_size(unit * micro_batches)
            engine.micro_steps = 0  # DeepSpeed steps at multiples of the new number
            if hasattr(engine.optimizer, "gradient_accumulation_steps"):
                engine.optimizer.gradient_accumulation_steps = micro_batches

    def _on_device(self, batch: Batch) -> Batch:
        # Positions stay: the bounds of documents are read off on the CPU, without waiting for the device.
        device = self.groups.device
        return {k: v if k == "positions" else v.to(device, non_blocking=True) for k, v in batch.items()}

    def _optimizer_step(self) -> float:
        """Clips and steps; returns the gradient norm before clipping, inf where DeepSpeed skipped the step for it."""
        config = self.resolved.config
        if config.parallel.zero_stage == 0 and config.training.dtype == "float32":
            norm = self._replicated_grad_norm()
            self.deepspeed.step()
            return norm.item()
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            return math.inf  # DeepSpeed still has the norm of the step before
        return float(self.deepspeed.get_global_grad_norm())

    def _replicated_grad_norm(self) -> Tensor:
        """ZeRO 0 in fp32: DeepSpeed clips with torch's function and keeps no norm. Gradients are whole on each rank."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))

    def _finish_routing(self, notes: list[ForwardRecords], n_loops: int, details: bool) -> Statistics:
        auxiliary = bool(self._aux.balance or self._aux.z)
        records = StepRecords(
            self.resolved.config.model, n_loops, details=details, auxiliary=auxiliary, device=self.groups.device
        )
        for own in notes:
            records.add(own)
        records.reduce(self.groups)
        layers = self.module.moe_layers()
        update_biases(layers, records.counts, self.resolved.router_bias_rate)
        largest = largest_bias(layers)
        return {
            **records.statistics(self.groups.layout.expert_stage_size),
            "router/bias_abs_max": self.groups.max(largest) if self.groups.pipelined else largest,
        }

    def _pipeline_metrics(self, own: PipelineRun) -> dict[str, float]:
        (idle,) = self.groups.sum([own.idle_share])
        return {
            "pipeline/idle_share": idle / self.groups.world_size,
            "pipeline/peak_held_visits": self.groups.max(own.peak_held),
        }

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.deepspeed.training
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train(was_training)
