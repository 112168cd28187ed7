"""Does the learning rate that is best for a narrow model stay best for a wide one?

The trainer scales the rate of matrices by lr_reference_dim / dim (Yang et al. 2022); if that is right, the best
`training.lr` is the same at widths 128 and 512, within the factor of two between the rates tried.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.studies import language
from mythos_ds.lab.studies.language import MEAN, finished, loss_at
from mythos_ds.lab.study import Report, Results, Study, by_arm, spread

WIDTHS = (128, 512)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
_HEAD = 32


def _overrides(width: int, rate: float, scale: str) -> dict[str, Any]:
    length = {
        "training.micro_batch_size": 8, "training.global_batch_size": 8,
        "training.max_steps": 60, "training.warmup_steps": 6, "training.eval_batches": 4,
    }  # fmt: skip
    return {
        "model.dim": width, "model.ffn_dim": 3 * width, "model.expert_dim": width // 2,
        "model.n_heads": width // _HEAD, "model.n_kv_heads": width // _HEAD // 2, "training.lr": rate,
        **(length if scale == "cpu" else {}),
    }  # fmt: skip


def arms(scale: str) -> list[Arm]:
    """Every width at every rate."""
    return [Arm(f"{width}/{rate:g}", "", _overrides(width, rate, scale)) for width in WIDTHS for rate in RATES]


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """One run per width and rate."""
    return {
        (arm.name, 0): make_spec(language.base(scale), arm, 0, loops=(1, MEAN), data_dir=data_dir)
        for arm in arms(scale)
    }


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Loss by width and rate, and the best rate of each width."""
    rows = [["width", *(f"lr {rate:g}" for rate in RATES), "best lr"]]
    best = {}
    for width in WIDTHS:
        losses = {rate: [loss_at(r, MEAN) for r in finished(results, f"{width}/{rate:g}")] for rate in RATES}
        found = {rate: sum(values) / len(values) for rate, values in losses.items() if values}
        best[width] = min(found, key=lambda rate: found[rate]) if found else None
        cells = [spread(losses[rate], 4) or "diverged" for rate in RATES]
        rows.append([str(width), *cells, "none" if best[width] is None else f"{best[width]:g}"])
    numbers = {"best": best, **language.numbers(results, arms(scale))}
    pictures = [("width.png", lambda path: draw(results, path))]
    return Report(numbers, [("Held-out loss at the trained depth, one seed", rows)], pictures)


def draw(results: Results, path: Path) -> None:
    """Loss against the learning rate, a line per width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for width in WIDTHS:
        points = [(rate, loss_at(r, MEAN)) for rate in RATES for r in by_arm(results, f"{width}/{rate:g}")
                  if "diverged" not in r]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"width {width}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="training.lr (matrices train at lr * 128 / width)", ylabel="held-out loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=110)


STUDY = Study("width", "Does the best learning rate carry over from width 128 to 512?", runs, analyse)
