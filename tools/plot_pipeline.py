"""Draws what each pipeline stage does in one optimizer step, as predicted, and prints what the pipeline costs."""

import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mythos_ds.config.layout import is_pipelined
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, planned_world_size, resolve
from mythos_ds.costs.pipeline import PipelinePrediction, VisitCost, predict
from mythos_ds.errors import ConfigError, MythosError, OptionError
from mythos_ds.formatting import number_text
from mythos_ds.mains import run_tool, tool_parser

# Forward and backward.
_COLOURS = {
    "prelude": ("#9ecae1", "#3182bd"),
    "loop with gradient": ("#a1d99b", "#31a354"),
    "loop without gradient": ("#d9d9d9", "#d9d9d9"),
    "coda": ("#fdae6b", "#e6550d"),
}
_ROW_HEIGHT = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    example = "mythos-ds plot-pipeline --config 1t.json --out ring.png parallel.pp_size=4"
    parser = tool_parser(__doc__ or "", example)
    parser.add_argument("--config", required=True, help="a run's JSON file or a preset")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes (default: the file's cluster)")
    parser.add_argument("--loops", type=int, metavar="T", help="loop count (default: model.mean_recurrence)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the drawing (needs matplotlib)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return run_tool(parser, _plot, argv)


def _plot(arguments: Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides).config
    if not is_pipelined(config.parallel):
        raise ConfigError("parallel.pp_size: given 1, which is no pipeline; allowed: at least 2 stages; nearest: 2.")
    loops = config.model.mean_recurrence if arguments.loops is None else arguments.loops
    if loops < 1:
        raise OptionError(f"--loops: given {loops}; allowed: at least 1; nearest: 1.")
    world_size = planned_world_size(config) if arguments.world_size is None else arguments.world_size
    resolved = resolve(config, world_size)
    prediction = predict(resolved, loops)
    title = f"{Path(arguments.config).stem}: {len(resolved.stages)} stages, T = {loops}"
    _draw(prediction, f"{title}, {prediction.n_micro_batches} micro-batches", arguments.out)
    console = Console()
    console.print(_table(resolved, prediction, title))
    console.print(f"idle over all processes  {prediction.bubble:.2%} (by FLOPs; messages take no time)")
    console.print(f"drawing  {arguments.out}", soft_wrap=True)


def _table(resolved: ResolvedRun, prediction: PipelinePrediction, title: str) -> Table:
    caption = "per process: most visits that wait for their backward, their messages; bytes sent in a step"
    table = Table(title=title, caption=caption)
    for name in ("stage", "ranks", "prelude", "recurrent", "coda", "idle", "visits held", "sent"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(resolved.stages):
        part = stage.part
        layers = (str(len(numbers)) for numbers in (part.prelude, part.recurrent, part.coda))
        held, sent = prediction.peak_held_bytes[number], prediction.sent_bytes[number]
        table.add_row(
            str(number),
            str(stage.size),
            *layers,
            f"{prediction.idle[number]:.2%}",
            f"{prediction.peak_held[number]}, {number_text(held)}B",
            f"{number_text(sent)}B",
        )
    return table


def _draw(prediction: PipelinePrediction, title: str, path: Path) -> None:
    """One row per stage. Raises MythosError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise MythosError("the drawing needs matplotlib: pip install 'mythos_ds[dev]'", code="MDS004") from error
    timeline = prediction.simulation.timeline
    figure = Figure(figsize=(14, 1.6 + 0.7 * len(timeline)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seen: set[tuple[str, bool]] = set()
    for stage, spans in enumerate(timeline):
        bars: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
        for action, start, end in spans:
            bars[_name(prediction.visits[stage][action.visit]), action.backward].append((start, end - start))
        for (name, backward), times in bars.items():
            place = (stage - _ROW_HEIGHT / 2, _ROW_HEIGHT)
            axes.broken_barh(times, place, facecolors=_COLOURS[name][backward], edgecolors="white", linewidth=0.2)
        seen |= bars.keys()
    axes.set_yticks(range(len(timeline)), [f"stage {stage}" for stage in range(len(timeline))])
    axes.invert_yaxis()
    axes.set(xlabel="time (FLOPs of one process)", xlim=(0, prediction.simulation.makespan), title=title)
    keys = [(name, backward) for name in _COLOURS for backward in (False, True) if (name, backward) in seen]
    patches = [
        Patch(color=_COLOURS[name][backward], label=f"{name}, {'backward' if backward else 'forward'}")
        for name, backward in keys
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _name(visit: VisitCost) -> str:
    if visit.kind == "loop":
        return "loop with gradient" if visit.has_gradient else "loop without gradient"
    return "loop with gradient" if visit.kind == "loops" else visit.kind


if __name__ == "__main__":
    sys.exit(main())
