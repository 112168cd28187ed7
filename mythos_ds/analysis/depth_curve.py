"""Held-out loss against the number of loops, far beyond the trained depth."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mythos_ds.analysis.plots import Results, labelled, loop_axis, new_panels, save
from mythos_ds.errors import LabError
from mythos_ds.model.mythos import MythosModel

MIN_POINTS = 6
_RATES = (1e-3, 10.0)


def depths_up_to(trained: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and T, 2T, up to 8T for the trained depth T."""
    last = 8 * trained
    powers = [2**i for i in range(last.bit_length())]
    return sorted({trained, 2 * trained, last, *(n for p in powers for n in (p, 3 * p) if n <= last)})


@torch.no_grad()
def measure(
    model: MythosModel, batches: Sequence[dict[str, Tensor]], *, loops: Sequence[int] | None = None
) -> dict[str, Any]:
    """Mean loss (nats per token) at each of `loops` (None: `depths_up_to`; T and 2T are added), as JSON values by name.

    batches: {tokens, targets, positions} int64 [rows, seq], of one size. `noise` is twice the standard error of a loss
    less its batch's mean over depths (null for one batch). Raises LabError for fewer than MIN_POINTS depths.
    """
    trained, device = model.config.mean_recurrence, next(model.parameters()).device
    counts = sorted({trained, 2 * trained, *(loops or depths_up_to(trained))})
    _check(counts)
    table = np.array([
        [
            float(
                model(
                    batch["tokens"].to(device),
                    n_loops=n,
                    positions=batch["positions"].to(device),
                    targets=batch["targets"].to(device),
                )
            )
            for n in counts
        ]
        for batch in batches
    ])  # fmt: skip
    noise = None
    if len(table) > 1:
        paired = table - table.mean(1, keepdims=True)
        noise = 2.0 * float(np.sqrt((paired.var(0, ddof=1) / len(table)).mean()))
    losses = table.mean(0).tolist()
    at = dict(zip(counts, losses, strict=True))
    best = min(at, key=lambda n: at[n])
    return {
        "trained": trained,
        "loops": counts,
        "loss": losses,
        "noise": noise,
        "ppl_ratio": math.exp(at[2 * trained] - at[trained]),
        "best_loops": best,
        "overthinking": at[counts[-1]] - at[best],
        "fit": fit(counts, losses, noise),
    }


def fit(loops: Sequence[int], losses: Sequence[float], noise: float | None = None) -> dict[str, Any]:
    """L(T) = L_inf + Z exp(-z T) by least squares, as {L_inf, Z, z, ...}.

    `held_out_error`, `largest_held_out_error`: |prediction / loss - 1| where one depth at a time is left out, mean and
    largest; `held_out_share`: the same mean error as a share of the losses' spread, which says whether the fit explains
    anything. `too_flat`: the spread is within the noise, and the parameters mean nothing. `rate_at_bound`: z is the
    least or greatest that is tried, so that the data do not say it. Raises LabError for fewer than MIN_POINTS depths.
    """
    _check(loops)
    x, y = np.asarray(loops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    level, scale, rate = _solve(x, y)
    kept = [np.arange(len(x)) != left for left in range(len(x))]
    solved = [_solve(x[own], y[own]) for own in kept]
    missed = [abs(own[0] + own[1] * math.exp(-own[2] * a) - b) for own, a, b in zip(solved, x, y, strict=True)]
    relative = np.array(missed) / np.abs(y).clip(min=1e-12)
    spread = float(np.max(y) - np.min(y))
    return {
        "L_inf": level,
        "Z": scale,
        "z": rate,
        "held_out_error": float(relative.mean()),
        "largest_held_out_error": float(relative.max()),
        "held_out_share": float(np.mean(missed)) / max(spread, 1e-12),
        "rate_at_bound": not _RATES[0] * 1.001 < rate < _RATES[1] / 1.001,
        "too_flat": spread <= (noise or 1e-6),
    }


def _solve(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """L_inf and Z are linear for a given z; z by a search on ever finer grids."""

    def linear(z: float) -> tuple[float, NDArray[np.float64]]:
        basis = np.stack([np.ones_like(x), np.exp(-z * (x - x[0]))], 1)
        found = np.linalg.lstsq(basis, y, rcond=None)[0]
        return float(np.square(basis @ found - y).sum()), found

    low, high = (math.log(rate) for rate in _RATES)
    best = low
    for _ in range(8):
        grid = np.linspace(low, high, 41)
        best = min(grid, key=lambda value: linear(math.exp(value))[0])
        low, high = max(low, best - (grid[2] - grid[0])), min(high, best + (grid[2] - grid[0]))
    rate = math.exp(best)
    level, scale = linear(rate)[1]
    return float(level), float(scale * math.exp(rate * x[0])), rate


def _check(loops: Sequence[int]) -> None:
    if len(set(loops)) < MIN_POINTS:
        raise LabError(f"depth curve: given {len(set(loops))} loop counts; allowed: at least {MIN_POINTS}")


def draw(results: Results, path: Path) -> None:
    """`measure`'s result, or several by label, as a PNG: loss, its fit (dashed), the best depth (star)."""
    runs = labelled(results)
    figure, axes = new_panels(1, 1)
    panel = axes[0, 0]
    for index, (label, own) in enumerate(runs.items()):
        color, fitted = f"C{index}", own["fit"]
        panel.plot(own["loops"], own["loss"], "o-", color=color, label=label or "held-out loss", ms=4)
        panel.plot([own["best_loops"]], [min(own["loss"])], "*", color=color, ms=12)
        if not fitted["too_flat"]:
            x = np.geomspace(own["loops"][0], own["loops"][-1], 200)
            panel.plot(x, fitted["L_inf"] + fitted["Z"] * np.exp(-fitted["z"] * x), "--", color=color, lw=0.9)
    loop_axis(panel, runs)
    panel.set(ylabel="loss (nats per token)")
    panel.legend(fontsize=8)
    save(figure, path)
