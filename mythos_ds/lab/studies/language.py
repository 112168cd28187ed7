"""The small language model that the studies on text train, and its arms. One run serves every study that names it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_ds.analysis import depth_curve
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.costs.flops import expected_flops_per_token
from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.study import Results, by_arm, spread
from mythos_ds.lab.sweep import Result

SEEDS = (0, 1, 2)
MEAN = 4
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
UNLOOPED = (1,)

_MODEL: dict[str, Any] = {
    "model.max_loops": 12,
    "model.loop_embedding": "none",
    "model.lora_rank": 0,
    "model.mean_recurrence": MEAN,
    "training.depth_distribution": "lognormal_poisson",
    "training.eval_batches": 4,
}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "model.dim": 64, "model.ffn_dim": 192, "model.expert_dim": 32,
        "training.seq_len": 128, "training.micro_batch_size": 16, "training.global_batch_size": 16,
        "training.max_steps": 300, "training.warmup_steps": 15,
    },
    "gpu": {
        "model.dim": 256, "model.ffn_dim": 768, "model.expert_dim": 128,
        "training.seq_len": 512, "training.micro_batch_size": 32, "training.global_batch_size": 32,
        "training.max_steps": 3000, "training.warmup_steps": 100, "training.dtype": "bfloat16",
    },
}  # fmt: skip

BASELINE = Arm("looped", "looped MoE, lognormal-Poisson depth")


def base(scale: str) -> dict[str, Any]:
    """The configuration that arms override."""
    return {**_MODEL, **SIZES[scale]}


def runs(
    arms: Sequence[Arm], scale: str, data_dir: str, *, equal_flops: bool = False
) -> dict[tuple[str, int], RunSpec]:
    """The runs of `arms`; with equal_flops their steps are such that each costs what the baseline does."""
    specs = {}
    for arm in arms:
        fitted = _fitted(arm, scale) if equal_flops else arm
        loops = UNLOOPED if arm.overrides.get("model.mean_recurrence") == 1 else LOOPS
        for seed in SEEDS:
            specs[arm.name, seed] = make_spec(base(scale), fitted, seed, loops=loops, data_dir=data_dir)
    return specs


def configuration(overrides: dict[str, Any]) -> RunConfig:
    """The configuration of overrides of the base preset."""
    spec = make_spec({}, Arm("", "", overrides), 0, loops=(), data_dir="data")
    return RunConfig.model_validate(spec.config)


def step_flops(config: RunConfig) -> float:
    """Expected FLOPs of a training step."""
    resolved = resolve(config, 1)
    return expected_flops_per_token(config, resolved.mean_backprop_depth).training * resolved.tokens_per_step


def _fitted(arm: Arm, scale: str) -> Arm:
    own = step_flops(configuration({**base(scale), **arm.overrides}))
    reference = step_flops(configuration(base(scale)))
    steps = round(base(scale)["training.max_steps"] * reference / own)
    return Arm(arm.name, arm.label, {**arm.overrides, "training.max_steps": steps}, arm.control)


def unlooped(layers: int) -> dict[str, Any]:
    """`layers` distinct MoE layers in place of the loop."""
    return {
        "model.recurrent_layers": layers,
        "model.mean_recurrence": 1,
        "model.max_loops": 1,
        "training.depth_distribution": "fixed",
    }


def loss_at(result: Result, loops: int) -> float:
    """Held-out loss in nats per token; that of the one trained depth where there is no loop."""
    return result["losses"]["1" if result["trained_depth"] == 1 else str(loops)]


def finished(results: Results, arm: str) -> list[Result]:
    """An arm's results without the runs that diverged."""
    return [result for result in by_arm(results, arm) if "diverged" not in result]


def paired_difference(results: Results, arm: str, reference: str, loops: int = MEAN) -> str:
    """Loss of `arm` less that of `reference` with the same seed (same text, same order): mean and deviation."""
    pairs = [
        (loss_at(result, loops), loss_at(results[reference, seed], loops))
        for (name, seed), result in sorted(results.items())
        if name == arm and "diverged" not in result
    ]
    return spread([own - other for own, other in pairs], 4) if pairs else "diverged"


def table(results: Results, arms: Sequence[Arm], reference: str) -> list[list[str]]:
    """One line per arm: losses at T, differences to `reference` seed by seed, what other depths do, and cost."""
    rows = [["arm", "loss at T", "minus reference", "PPL(2T)/PPL(T)", "PPL(8T)/PPL(T)", "PPL(T)/PPL(1)", "best T",
             "parameters", "training TFLOPs", "seconds"]]  # fmt: skip
    for arm in arms:
        own = finished(results, arm.name)
        if not own:
            rows.append([arm.label, "diverged", *[""] * 8])
            continue

        def ratio(loops: int, to: int, own: list[Result] = own) -> str:
            if own[0]["trained_depth"] == 1:
                return ""
            return spread([math.exp(loss_at(result, loops) - loss_at(result, to)) for result in own], 4)

        looped = own[0]["trained_depth"] > 1
        best = sorted({min(result["losses"].items(), key=lambda item: item[1])[0] for result in own}, key=int)
        rows.append([
            arm.label,
            spread([loss_at(result, MEAN) for result in own], 4),
            paired_difference(results, arm.name, reference),
            ratio(2 * MEAN, MEAN), ratio(8 * MEAN, MEAN), ratio(MEAN, 1), ", ".join(best) if looped else "",
            f"{own[0]['parameters']:,}",
            f"{own[0]['training_flops'] / 1e12:.2f}",
            spread([result["seconds"] for result in own], 0),
        ])  # fmt: skip
    return rows


def depth_fits(results: Results, arms: Sequence[Arm]) -> list[list[str]]:
    """A table of saturating-exponential fits to the losses over loop counts, seeds averaged."""
    rows = [["arm", "L_inf", "Z", "z", "held-out error", "of the curve's spread", "spread of the curve (nats)"]]
    for arm in arms:
        own = finished(results, arm.name)
        if not own or own[0]["trained_depth"] == 1:
            continue
        loops = sorted(map(int, own[0]["losses"]))
        losses = [sum(result["losses"][str(n)] for result in own) / len(own) for n in loops]
        fitted = depth_curve.fit(loops, losses)
        rows.append([
            arm.label, f"{fitted['L_inf']:.4f}", f"{fitted['Z']:.4f}",
            f"{fitted['z']:.2f}" + (" (at the bound)" if fitted["rate_at_bound"] else ""),
            f"{fitted['held_out_error']:.3%}", f"{fitted['held_out_share']:.0%}", f"{max(losses) - min(losses):.4f}",
        ])  # fmt: skip
    return rows


def numbers(results: Results, arms: Sequence[Arm]) -> dict[str, Any]:
    """What results.json keeps of each run."""
    kept = ("losses", "diverged", "parameters", "training_flops", "tokens", "seconds")
    return {
        arm.name: [{name: result[name] for name in kept if name in result} for result in by_arm(results, arm.name)]
        for arm in arms
    }


def draw_depth(results: Results, arms: Sequence[Arm], path: Path) -> None:
    """Held-out loss against the loop count, less what the first arm has at T with the same seed (seeds differ by more
    than arms do): mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(arms):
        curves = [
            {int(loops): loss - loss_at(results[arms[0].name, seed], MEAN) for loops, loss in result["losses"].items()}
            for (name, seed), result in sorted(results.items())
            if name == arm.name and "diverged" not in result
        ]
        if not curves:
            continue
        looped, colour = finished(results, arm.name)[0]["trained_depth"] > 1, f"C{index % 10}"
        loops = sorted(curves[0]) if looped else [1]
        columns = [[curve[count] for curve in curves] for count in loops]
        means = [sum(column) / len(column) for column in columns]
        if not looped:
            axes.axhline(means[0], ls="--", lw=1, label=f"{arm.label} (no loop)", color=colour)
            continue
        axes.fill_between(loops, [min(c) for c in columns], [max(c) for c in columns], alpha=0.12, lw=0, color=colour)
        axes.plot(loops, means, "o-", ms=3, lw=1.2, label=arm.label, color=colour)
    axes.axvline(MEAN, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="loops at evaluation (dotted: mean of training)", ylabel=f"loss - {arms[0].label} at T (nats)")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
