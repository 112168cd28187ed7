"""Draws the pictures of docs/concepts.md: `python docs/pictures/draw.py [FOLDER]`, with the extra `lab`."""

import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, GREEN, ORANGE, GREY, RED = "#dbe7f6", "#dcefdc", "#fbe6cc", "#eeeeee", "#f6dada"
INK, MUTED = "#222222", "#666666"
RANKS = ("#2b6cb0", "#2f855a", "#b7791f", "#9b2c2c")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture in inches, whose coordinates are tenths of an inch."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str = "", fill: str = GREY, size: float = 10) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1", fc=fill, ec=INK, lw=1)
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.4)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0, color: str = INK
) -> None:
    """An arrow, bent to its side by a share of its length."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, connectionstyle=style, color=color, lw=1.4)
    )


def path(axes: Axes, points: list[tuple[float, float]]) -> None:
    """A line with corners that ends in an arrow."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color=INK, lw=1.4, solid_joinstyle="round")
    arrow(axes, points[-2], points[-1])


def note(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Small text around (x, y)."""
    defaults = {"ha": "center", "va": "center", "fontsize": 9, "color": MUTED, "linespacing": 1.4}
    axes.text(x, y, text, **{**defaults, **options})  # type: ignore[arg-type]


def draw_model() -> Figure:
    """Prelude, looped block, coda."""
    figure, axes = canvas(9, 3.6)
    box(axes, 2, 12, 10, 9, "tokens\n[batch, seq]", "white")
    box(axes, 16, 12, 14, 9, "embedding,\nprelude\n(dense layers)", BLUE)
    box(axes, 38, 6, 26, 22, "", GREEN)
    note(axes, 51, 25.4, "looped block: T times, the same weights", color=INK)
    box(axes, 40, 8.5, 7.6, 13, "injection\nA h + B e", "white", 8.5)
    box(axes, 49.6, 8.5, 12.4, 13, "layers:\nattention +\nrouter, experts", "white", 8.5)
    box(axes, 70, 12, 9, 9, "coda,\nhead", BLUE)
    box(axes, 82, 12, 6.6, 9, "logits", "white")
    for start, end in ((12, 16), (64, 70), (79, 82)):
        arrow(axes, (start, 16.5), (end, 16.5))
    arrow(axes, (30, 16.5), (40, 16.5))
    note(axes, 34, 18.4, "e", fontsize=12, color=INK)
    arrow(axes, (47.6, 15), (49.6, 15))
    path(axes, [(62, 10.5), (66, 10.5), (66, 3), (43.8, 3), (43.8, 8.5)])
    note(axes, 55, 1.4, "h, the state: [batch, seq, dim], after each of T loops")
    note(axes, 67, 18.4, "h after T", fontsize=9)
    note(axes, 45, 33, "h' = A h + B e + Transformer(h, e),  rho(A) < 1", fontsize=12, color=INK)
    note(axes, 23, 9.6, "once")
    note(axes, 74.5, 9.6, "once")
    return figure


def draw_exchange() -> Figure:
    """Rows of tokens go to the ranks of their experts and back."""
    figure, axes = canvas(9, 4.6)
    columns = {"tokens": 9, "sorted": 27, "arrived": 53, "results": 79}
    titles = (
        "tokens, each with\nk = 2 experts",
        "rows, sorted\nby expert",
        "rows of all ranks\nat their experts",
        "results, added\nby weight",
    )
    for x, title in zip(columns.values(), titles, strict=True):
        note(axes, x, 43, title, color=INK)
    experts = ((0, 3), (1, 2), (3, 1), (2, 0))
    for rank in range(4):
        y = 33 - 9 * rank
        note(axes, 1.4, y + 1.6, f"rank {rank}", rotation=90, color=RANKS[rank], fontsize=9.5)
        box(axes, 4, y - 1.6, 10, 6.4, "", "white")
        for place, (first, second) in enumerate((experts[rank], experts[(rank + 1) % 4])):
            axes.text(
                9,
                y + 3.2 - 3.2 * place,
                f"token: {first}, {second}",
                ha="center",
                va="center",
                fontsize=8.5,
                color=RANKS[rank],
            )
        rows = sorted([*experts[rank], *experts[(rank + 1) % 4]])
        for place, expert in enumerate(rows):
            box(axes, 19.4 + 3.8 * place, y, 3.4, 3.2, str(expert), "white", 9)
            arrow(axes, (35, y + 1.6), (44.8, 33 - 9 * expert + 1.6), color=RANKS[rank])
        box(axes, 45, y - 1.6, 16, 6.4, f"expert {rank}\ncomputes what arrived", GREEN, 8.5)
        for target in range(4):
            if rank in (*experts[target], *experts[(target + 1) % 4]):
                arrow(axes, (61.2, y + 1.6), (73.8, 33 - 9 * target + 1.6), color=RANKS[target])
        box(axes, 74, y - 1.6, 10, 6.4, "tokens", "white", 9)
        arrow(axes, (14, y + 1.6), (19.2, y + 1.6))
    note(axes, 40, 0.9, "all-to-all: counts, then rows of dim numbers")
    note(axes, 67.5, 0.9, "all-to-all: results")
    return figure


def draw_ring() -> Figure:
    """Four pipeline stages in a ring, and what passes around it."""
    figure, axes = canvas(9, 4.2)
    held = (
        "embedding\nprelude 0\ninjection (keeps e)\nlooped 0, 1\ncoda 0, 1",
        "prelude 1\nlooped 2, 3\ncoda 2",
        "prelude 2\nlooped 4, 5\ncoda 3",
        "prelude 3\nlooped 6, 7\nfinal norm, head",
    )
    for stage, text in enumerate(held):
        x = 3 + 22 * stage
        box(axes, x, 20, 17, 13, text, BLUE, 9)
        note(axes, x + 8.5, 34.6, f"stage {stage}", color=INK, fontsize=10)
        if stage < 3:
            arrow(axes, (x + 17, 26.5), (x + 22, 26.5))
    path(axes, [(86, 26.5), (88.5, 26.5), (88.5, 38.6), (11.5, 38.6), (11.5, 36)])
    note(axes, 50, 40.2, "the next pass starts again at stage 0")
    note(axes, 45, 16.6, "one micro-batch passes T + 2 times around the ring:", color=INK, fontsize=10)
    passes = (
        ("pass 0", "prelude", BLUE),
        ("pass 1", "loop 1", GREEN),
        ("pass 2", "loop 2", GREEN),
        ("...", "", "white"),
        ("pass T", "loop T", GREEN),
        ("pass T + 1", "coda, loss", BLUE),
    )
    for place, (name, work, fill) in enumerate(passes):
        box(axes, 7 + 13 * place, 7, 11, 6.4, f"{name}\n{work}" if work else name, fill, 9)
        if place:
            arrow(axes, (5 + 13 * place, 10.2), (7 + 13 * place, 10.2))
    note(
        axes,
        45,
        3.4,
        "per hop travels one tensor, the residual stream [rows, seq, dim]; a stage's work in one pass is a visit",
    )
    return figure


def draw_checkpoint() -> Figure:
    """From the running engine to a checkpoint, and from there on."""
    figure, axes = canvas(9, 3.9)
    steps = (
        ("all ranks write\ninto a hidden folder", ORANGE),
        ("rank 0 writes\nmanifest.json\n(sizes, checksums)", ORANGE),
        ("all ranks read back\nand compare", ORANGE),
        ("rename to\nstep_00000400,\nlatest points to it", GREEN),
    )
    for place, (text, fill) in enumerate(steps):
        box(axes, 3 + 22 * place, 23, 17, 10, text, fill, 9)
        if place:
            arrow(axes, (-2 + 22 * place, 28), (3 + 22 * place, 28))
    note(axes, 36, 36, "a stop here: the checkpoint before is used, the hidden folder is removed by the next save")
    note(axes, 77.5, 36, "complete", color=INK)
    ways = (
        ("resume in the same layout:\nbitwise", BLUE),
        ("resume in another layout:\nresharded while loading", BLUE),
        ("mythos-ds merge:\na model folder", BLUE),
        ("mythos-ds convert:\ntransformers, vLLM", BLUE),
    )
    for place, (text, fill) in enumerate(ways):
        box(axes, 3 + 22 * place, 4, 18, 8, text, fill, 9)
    axes.plot([77.5, 77.5, 12], [23, 17.5, 17.5], color=INK, lw=1.4)
    for x in (12, 34, 56):
        arrow(axes, (x, 17.5), (x, 12))
    arrow(axes, (65, 8), (69, 8))
    note(axes, 40, 19.2, "every load verifies the files first; a damaged checkpoint is skipped with a warning")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "model": draw_model,
    "exchange": draw_exchange,
    "ring": draw_ring,
    "checkpoint": draw_checkpoint,
}


def main(folder: Path) -> None:
    """Write every picture as PNG on white."""
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
