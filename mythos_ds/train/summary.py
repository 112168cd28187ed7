"""The closing words of a run: loss at each loop count, a text sample, and where everything lies."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mythos_ds.checkpoint import manifest
from mythos_ds.train.evaluation import perplexity
from mythos_ds.train.run_directory import RunDirectory


@dataclass(frozen=True)
class RunSummary:
    """What a run shows when it ends. Losses in nats per token by loop count; samples are (prompt, continuation)."""

    step: int
    finished: bool
    first_loss: float | None
    losses: dict[int, float]
    samples: list[tuple[str, str]]


def show_summary(
    console: Console, summary: RunSummary, run: RunDirectory, mean_recurrence: int, stage: str | None = None
) -> None:
    """Print the summary of a run, or of its training stage `stage`, to `console`."""
    if stage is not None:
        console.rule(f"stage {stage}")
    if not summary.finished:
        console.print(f"stopped after step {summary.step}; the same command goes on from there")
    if summary.losses:
        console.print(_depth_table(summary.losses, mean_recurrence))
    elif summary.finished:
        console.print("no validation: no held-out loss was computed")
    last = summary.losses.get(mean_recurrence)
    if summary.first_loss is not None and last is not None:
        fall = 100.0 * (1.0 - last / summary.first_loss)
        console.print(
            f"validation loss at {mean_recurrence} loops: {summary.first_loss:.4f} before training, "
            f"{last:.4f} after step {summary.step}: down {fall:.1f} %",
            soft_wrap=True,
        )
    for prompt, continuation in summary.samples:
        console.rule("sample")
        console.print(prompt, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
        console.print(continuation, markup=False, highlight=False, soft_wrap=True)
    console.rule()
    places: dict[str, object] = {"metrics": run.metrics}
    if run.tensorboard.is_dir():
        places["TensorBoard"] = f"tensorboard --logdir {run.tensorboard}"
    if run.csv.is_file():
        places["table"] = run.csv
    tags = manifest.list_tags(run.checkpoints)
    if tags:
        places["checkpoint"] = tags[0]
    for name, place in places.items():
        console.print(f"{name:<12} {place}", markup=False, highlight=False, soft_wrap=True)


def _depth_table(losses: dict[int, float], mean_recurrence: int) -> Table:
    table = Table(title="held-out text by loop count")
    for column in ("loops", "loss (nats/token)", "perplexity", "PPL / PPL(T)"):
        table.add_column(column, justify="right")
    reference = losses[mean_recurrence]
    for n_loops, loss in losses.items():
        name = f"{n_loops} (T)" if n_loops == mean_recurrence else str(n_loops)
        ratio = perplexity(loss - reference)
        table.add_row(name, f"{loss:.4f}", f"{perplexity(loss):.2f}", f"{ratio:.3f}")
    return table
