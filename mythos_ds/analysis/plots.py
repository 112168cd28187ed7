"""What the pictures of looped models share: panels over loops, one line per model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_ds.errors import LabError

Results = Mapping[str, Any]


def labelled(results: Results) -> dict[str, dict[str, Any]]:
    """Measurements by label, from one measurement (which names its trained depth) or from several."""
    return {"": dict(results)} if "trained" in results else dict(results)


def new_panels(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]. Raises LabError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LabError("pictures need matplotlib: pip install 'mythos_ds[lab]'", code="MDS004") from error
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def loop_axis(axes: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """Loops in powers of two along x, with a dotted line at each trained depth."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("loops")
    for trained in sorted({own["trained"] for own in results.values()}):
        axes.axvline(trained, color="grey", lw=0.9, ls=":")
        axes.annotate(f" T = {trained}", (trained, 0.01), xycoords=("data", "axes fraction"), fontsize=7, color="grey")


def save(figure: Any, path: Path) -> None:
    """Writes the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
