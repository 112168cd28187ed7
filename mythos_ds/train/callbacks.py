"""What can be hooked into a training run, and when.

Every method is called on every rank, at the same step and in the same order, so a callback may use collectives; what it
does collectively it must do on all ranks. Callbacks are called in the order of the list they were given in. For each
optimizer step:

1. `before_step`: the step's loop count and learning rate are known.
2. `after_backward`: the gradients of all micro-batches are there, the optimizer has not moved yet.
3. `after_step`: the weights have moved and the step's metrics are written. In its place `on_anomaly` is called where
   the loss or the gradient norm is not finite; the run then ends with NumericsError.

`on_save` is called once a checkpoint is complete on disk: with `checkpoint.asynchronous` between two later steps, else
before the next one. `on_end` is called last, when the run is complete or was asked to stop, not after an error. A run
of several training stages has another engine in each, and calls `on_end` at the end of each.

An exception in a callback ends the run as any other: a MythosError with its message and exit code 2, others with a
traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.config.schema import RunConfig
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.model.mythos import MythosModel
from mythos_ds.train.data_loader import DataLoader
from mythos_ds.train.summary import RunSummary


@dataclass(frozen=True)
class CallbackState:
    """Where a run stands, for reading; a new object at every call."""

    engine: TrainingEngine
    """Its `gradient`, `eval_loss` and `logits` are collective."""
    data: DataLoader
    run_dir: Path
    total_steps: int
    """Steps after which the run, or its training stage, is complete."""
    step: int
    """Completed optimizer steps: in `before_step` and `after_backward` those before the step at hand."""
    n_loops: int | None = None
    """Loops of the step at hand, else of the last one; None before the first step of this start."""
    lr: float | None = None
    """Scheduled learning rate of the same step, before each parameter group's own factor."""
    loss: float | None = None
    """Mean cross-entropy of the same step in nats per token, the same on all ranks; None until its backward is done."""
    grad_norm: float | None = None
    """Global gradient norm of the same step before clipping; None until the optimizer has moved."""

    @property
    def model(self) -> MythosModel:
        """The model, or the part of it on this rank. Under ZeRO-3 its parameters are empty outside of a forward."""
        return self.engine.module

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.engine.resolved.config

    @property
    def rank(self) -> int:
        """This process's rank among all."""
        return self.engine.groups.rank


class Callback:
    """The base of what is hooked into a run: override the methods you need. The module's docstring says when, and on
    which ranks, they are called."""

    def before_step(self, state: CallbackState) -> None:
        """Called before an optimizer step's forward."""

    def after_backward(self, state: CallbackState) -> None:
        """Called between the last backward and the optimizer, also where the loss is not finite;
        `state.engine.gradient` reads gradients."""

    def after_step(self, state: CallbackState) -> None:
        """Called after an optimizer step, before the evaluation and the checkpoint that may be due at it."""

    def on_anomaly(self, state: CallbackState) -> None:
        """Called where `state.loss` or `state.grad_norm` is not finite, before NumericsError is raised."""

    def on_save(self, state: CallbackState, checkpoint: Path) -> None:
        """Called when `checkpoint` is complete on disk; `state.step` may be a later step than its own."""

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        """Called when training is over and its metrics are written, before the summary is shown."""


class CallbackList(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = tuple(callbacks)

    def before_step(self, state: CallbackState) -> None:
        for callback in self._callbacks:
            callback.before_step(state)

    def after_backward(self, state: CallbackState) -> None:
        for callback in self._callbacks:
            callback.after_backward(state)

    def after_step(self, state: CallbackState) -> None:
        for callback in self._callbacks:
            callback.after_step(state)

    def on_anomaly(self, state: CallbackState) -> None:
        for callback in self._callbacks:
            callback.on_anomaly(state)

    def on_save(self, state: CallbackState, checkpoint: Path) -> None:
        for callback in self._callbacks:
            callback.on_save(state, checkpoint)

    def on_end(self, state: CallbackState, summary: RunSummary) -> None:
        for callback in self._callbacks:
            callback.on_end(state, summary)
