"""IsoFLOP sweep: at each budget of training FLOPs, how deep should the loop be, and how many tokens should it see?

A parabola in log(mean recurrence) per budget gives the best depth; power laws over budgets give the exponents
mu* ~ C^a and D* ~ C^b, next to 0.40 and 0.78 of Parcae (arXiv 2604.12946) for 140M and 370M parameters.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mythos_ds.errors import LabError
from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.studies import language
from mythos_ds.lab.studies.language import configuration, loss_at, step_flops
from mythos_ds.lab.study import Report, Results, Study

BUDGETS = (0.125, 0.25, 0.5, 1.0)
"""In units of the baseline's training FLOPs."""
DEPTHS = (1, 2, 4, 8)
PUBLISHED = {"depth": 0.40, "tokens": 0.78}
MIN_BUDGETS, MIN_DEPTHS = 4, 4
_RESAMPLES = 2000


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """One run per budget, depth and seed; its name is `budget/depth`."""
    total = language.base(scale)["training.max_steps"] * step_flops(configuration(language.base(scale)))
    specs = {}
    for budget in BUDGETS:
        for depth in DEPTHS:
            overrides = {"model.mean_recurrence": depth, "model.max_loops": 3 * depth}
            steps = round(budget * total / step_flops(configuration({**language.base(scale), **overrides})))
            overrides |= {"training.max_steps": steps, "training.warmup_steps": max(5, steps // 20)}
            for seed in language.SEEDS[:2]:
                arm = Arm(f"{budget}/{depth}", "", overrides)
                specs[arm.name, seed] = make_spec(language.base(scale), arm, seed, loops=(depth,), data_dir=data_dir)
    return specs


def best_depth(depths: Sequence[float], losses: Sequence[float]) -> float:
    """Where the least-squares parabola in log depth is lowest. Raises LabError for fewer than four depths, a parabola
    that opens downwards, or a minimum outside of the depths tried."""
    if len(set(depths)) < MIN_DEPTHS:
        raise LabError(f"{len(set(depths))} depths at a budget; a parabola is fitted to {MIN_DEPTHS} or more")
    curvature, slope, _ = np.polyfit(np.log(np.asarray(depths)), np.asarray(losses), 2)
    lowest = math.exp(-slope / (2 * curvature)) if curvature > 0 else math.nan
    if not min(depths) <= lowest <= max(depths):
        raise LabError(f"no minimum between depths {min(depths)} and {max(depths)}")
    return lowest


def exponent(budgets: Sequence[float], optima: Sequence[float]) -> float:
    """b of optimum ~ budget^b. Raises LabError for fewer than four budgets."""
    if len(budgets) < MIN_BUDGETS:
        raise LabError(f"an optimum at {len(budgets)} budgets; an exponent is fitted to {MIN_BUDGETS} or more")
    return float(np.polyfit(np.log(np.asarray(budgets)), np.log(np.asarray(optima)), 1)[0])


def tokens_at(depth: float, known: Mapping[int, float]) -> float:
    """Tokens of a budget at a depth between those tried, by interpolation of logarithms."""
    depths = sorted(known)
    return math.exp(np.interp(math.log(depth), np.log(np.asarray(depths)), np.log([known[d] for d in depths])))


def fit(
    points: Mapping[float, Mapping[int, Sequence[float]]], tokens: Mapping[float, Mapping[int, float]]
) -> dict[str, Any]:
    """Exponents with 95 % bootstrap intervals (seeds drawn anew at each point), or why there are none.

    points: losses by budget and depth, one per seed.
    """
    optima: dict[float, float | str] = {}
    for budget, losses in points.items():
        flat = [(depth, value) for depth, values in losses.items() for value in values]
        try:
            optima[budget] = best_depth(*map(list, zip(*flat, strict=True)))
        except LabError as error:
            optima[budget] = str(error)
    result: dict[str, Any] = {"optima": optima}
    numeric = {budget: value for budget, value in optima.items() if not isinstance(value, str)}
    try:
        result |= _exponents(numeric, tokens)
    except LabError as error:
        return {**result, "refused": str(error)}
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        try:
            resampled = {
                budget: best_depth(list(losses), [float(generator.choice(values)) for values in losses.values()])
                for budget, losses in points.items()
            }
            drawn.append(_exponents(resampled, tokens))
        except LabError:
            continue
    result["resamples_with_a_fit"] = len(drawn) / _RESAMPLES
    for name in PUBLISHED:
        values = [draw[name] for draw in drawn]
        result[f"{name}_interval"] = [float(np.quantile(values, q)) for q in (0.025, 0.975)] if values else None
    return result


def _exponents(optima: Mapping[float, float], tokens: Mapping[float, Mapping[int, float]]) -> dict[str, float]:
    budgets = sorted(optima)
    return {
        "depth": exponent(budgets, [optima[budget] for budget in budgets]),
        "tokens": exponent(budgets, [tokens_at(optima[budget], tokens[budget]) for budget in budgets]),
    }


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Losses by budget and depth, the optima, and exponents or the reason for none."""
    points: dict[float, dict[int, list[float]]] = {}
    tokens: dict[float, dict[int, float]] = {}
    for (name, _), result in sorted(results.items()):
        budget, depth = float(name.split("/")[0]), int(name.split("/")[1])
        points.setdefault(budget, {}).setdefault(depth, []).append(loss_at(result, depth))
        tokens.setdefault(budget, {})[depth] = result["tokens"]
    found = fit(points, tokens)
    rows = [["budget (of the baseline's FLOPs)", *(f"mean T = {depth}" for depth in DEPTHS), "best T"]]
    for budget in BUDGETS:
        best = found["optima"][budget]
        means = [f"{np.mean(points[budget][depth]):.4f}" for depth in DEPTHS]
        rows.append([str(budget), *means, best if isinstance(best, str) else f"{best:.2f}"])
    laws = [["exponent", "here", "95 % interval", "Parcae"]]
    for name, label in (("depth", "best mean T ~ C^a"), ("tokens", "tokens ~ C^b")):
        interval = found.get(f"{name}_interval")
        shown = "none" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
        here = f"{found[name]:.2f}" if name in found else f"not fitted: {found['refused']}"
        laws.append([label, here, shown, f"{PUBLISHED[name]:.2f}"])
    numbers = {**found, "points": points, "tokens": tokens}
    return Report(
        numbers,
        [("Held-out loss at the trained depth, mean of two seeds", rows), ("Power laws", laws)],
        [("scaling.png", lambda path: draw(points, found["optima"], path))],
    )


def draw(points: Mapping[float, Mapping[int, Sequence[float]]], optima: Mapping[float, Any], path: Path) -> None:
    """Loss against mean recurrence, a parabola per budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (budget, losses) in enumerate(sorted(points.items())):
        depths = sorted(losses)
        flat = [(depth, value) for depth in depths for value in losses[depth]]
        axes.plot(*zip(*flat, strict=True), "o", ms=4, color=f"C{index}", label=f"{budget} of the budget")
        grid = np.geomspace(depths[0], depths[-1], 60)
        curve = np.polyfit(np.log([d for d, _ in flat]), [v for _, v in flat], 2)
        axes.plot(grid, np.polyval(curve, np.log(grid)), "-", lw=1, color=f"C{index}")
        if not isinstance(optima[budget], str):
            axes.axvline(optima[budget], color=f"C{index}", lw=0.7, ls=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="mean recurrence in training", ylabel="held-out loss (nats per token)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study("scaling", "How deep should the loop be at a given budget?", runs, analyse)
