"""Where the numbers of a run go: metrics.jsonl (the record), its views (TensorBoard, CSV, W&B), the progress line."""

from pathlib import Path
from types import TracebackType
from typing import Any

from mythos_ds.config.schema import MonitorConfig
from mythos_ds.monitor.csv_table import CsvWriter
from mythos_ds.monitor.metrics import MetricsWriter, read_lines
from mythos_ds.monitor.progress import ProgressLine
from mythos_ds.monitor.tensorboard import TensorBoardWriter
from mythos_ds.monitor.views import View
from mythos_ds.monitor.weights_and_biases import WandbWriter
from mythos_ds.train.run_directory import RunDirectory

Values = dict[str, float | list[float]]
LOSS, FIRST_LOSS = "validation/loss_at_", "validation/first_loss_at_"
"""Names of losses on held-out text, before the loop count."""


def validation_history(metrics: Path, start_step: int, end_step: int) -> list[dict[str, Any]]:
    """{"step", "losses": {loop count: nats per token}} of every evaluation that a file of metrics has of a training
    stage between two steps; [] without the file."""
    found: dict[int, dict[str, float]] = {}
    for values in read_lines(metrics) if metrics.is_file() else ():
        step = values["step"]
        if start_step < step <= end_step or step == start_step == 0:
            losses = {name.removeprefix(LOSS): loss for name, loss in values.items() if name.startswith(LOSS)}
            found.setdefault(step, {}).update(losses)
    return [{"step": step, "losses": losses} for step, losses in sorted(found.items()) if losses]


def _views(run: RunDirectory, monitor: MonitorConfig, kept: int) -> list[View]:
    """The views, with the steps up to `kept`."""
    views: list[View] = []
    if monitor.tensorboard:
        views.append(TensorBoardWriter(run.tensorboard, kept))
    if monitor.csv:
        views.append(CsvWriter(run.csv, run.metrics, kept))
    if monitor.wandb is not None:
        views.append(WandbWriter(run.root, run.wandb, monitor.wandb, run.configuration))
    return views


class MetricsLogger:
    """Writes on rank 0 and is silent elsewhere.

    Every step is there once: what an interrupted start wrote of steps after `start_step` is dropped, and what is there
    of `start_step` itself (a run that had ended evaluates again) is not written again.
    """

    def __init__(self, run: RunDirectory, monitor: MonitorConfig, enabled: bool, start_step: int, total_steps: int):
        self._metrics: MetricsWriter | None = None
        self._views: list[View] = []
        self._there: set[tuple[int, str]] = set()
        if enabled:
            kept = start_step if start_step else -1
            self._metrics = MetricsWriter(run.metrics)
            self._there = {(kept, name) for name in self._metrics.truncate_after(kept)}
            self._views = _views(run, monitor, kept)
        self._progress = ProgressLine(total_steps, enabled, start_step)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in (self._progress, *self._views, self._metrics):
            if sink is not None:
                sink.close()

    def step(self, step: int, values: Values) -> None:
        """The metrics of a logged optimizer step, counted from 1."""
        self._write(step, values)
        self._progress.log(step, values)

    def progress(self, step: int, loss: float, n_loops: int) -> None:
        """Move the progress line; called after every step."""
        self._progress.update(step, loss=loss, n_loops=n_loops)

    def evaluation(self, step: int, losses: dict[int, float], *, first: bool = False) -> None:
        """Validation losses by loop count; nothing without validation. first: those of a later training stage's own
        text before its first step, at which the stage before has ended."""
        name = FIRST_LOSS if first else LOSS
        self._write(step, {f"{name}{n_loops}": loss for n_loops, loss in losses.items()})

    def checkpoint(self, step: int, seconds: dict[str, float]) -> None:
        """How long the save took that has come to its end, if one has."""
        for view in self._views if seconds else ():
            view.write(step, dict(seconds))

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Generated text, as (prompt, continuation)."""
        for view in self._views:
            for index, (prompt, continuation) in enumerate(samples):
                view.text(step, f"sample/{index}", f"{prompt}|{continuation}")

    def _write(self, step: int, values: Values) -> None:
        new = {name: value for name, value in values.items() if (step, name) not in self._there}
        if self._metrics is not None and new:
            self._metrics.write(step, new)
        for view in self._views if values else ():
            view.write(step, values)
