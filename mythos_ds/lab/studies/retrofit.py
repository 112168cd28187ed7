"""A dense model cut into a loop: where to cut, how small A must start, and what training adds, at equal tokens and at
equal compute. On SmolLM2-135M-Instruct.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds.analysis.loop_losses import paired
from mythos_ds.config.loader import load_config
from mythos_ds.conversion.recipe import recipe_cut, recipe_overrides
from mythos_ds.conversion.retrofit import Cut, retrofit_config
from mythos_ds.lab.smollm.recipe_run import EQUAL_COMPUTE, STEPS, fastest_dtype
from mythos_ds.lab.smollm.source import CACHE, require_source
from mythos_ds.lab.spec import RunSpec
from mythos_ds.lab.study import Report, Results, Study
from mythos_ds.lab.sweep import Result

WORKER = "mythos_ds.lab.smollm.worker"
CUTS = ((10, 10, 10), (12, 10, 8), (12, 6, 12), (14, 4, 12))
DECAYS = (0.447, 0.2, 0.1, 0.05)
LOOPS = (1, 2, 4, 8)
SEEDS = (0, 1)
_SEQUENCES = {"untrained": 8, "trained": 16}
_GATE_STEPS = 24
_GATE_COMPUTE = 1.3
"""FLOPs of a step that trains the gates alone over those of the same at one loop."""
_SOURCE = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "rms_norm_eps": 9.999999747378752e-06, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
_GATES = ["embed.*", "prelude.*", "coda.*", "norm.*", "recurrent.layers.*"]
"""Frozen where only the gates are trained; the head is the embedding."""
_ONCE = {"model.mean_recurrence": 1, "training.depth_distribution": "fixed", "training.mean_backprop_depth": 1}
_ALONE = {
    "parallel.ep_size": 1, "parallel.zero_stage": 0, "parallel.activation_checkpointing": "none",
    "training.micro_batch_size": 2, "training.eval_interval": 0, "training.eval_batches": 1,
    "checkpoint.interval": 0, "monitor.tensorboard": False, "monitor.sample_prompts": [], "data.split": [97, 3, 0],
    "deepspeed.zero_optimization": None,
}  # fmt: skip


@dataclass(frozen=True)
class RetrofitArm:
    """One line of a table: a cut, A at the start, and how it is trained (None: not at all)."""

    name: str
    label: str
    cut: tuple[int, int, int]
    decay: float
    training: Mapping[str, Any] | None
    seeds: Sequence[int] = SEEDS


def _words(cut: tuple[int, int, int]) -> str:
    return " + ".join(map(str, cut))


UNTRAINED = [
    RetrofitArm(f"untrained/{'-'.join(map(str, cut))}/{decay:g}", _words(cut), cut, decay, None, (0,))
    for cut in CUTS
    for decay in DECAYS
]
_BEST, _BLOCK_SINK = CUTS[1], CUTS[0]
TRAINED = [
    RetrofitArm("loop", f"{_words(_BEST)}, A 0.05: the recipe", _BEST, 0.05, {}),
    RetrofitArm("control", "the source (1 loop), equal tokens", _BEST, 0.05, _ONCE),
    RetrofitArm("control_compute", "the source (1 loop), equal compute", _BEST, 0.05,
                {**_ONCE, "training.max_steps": round(STEPS * EQUAL_COMPUTE)}),
    RetrofitArm("large_decay", f"{_words(_BEST)}, A 0.447", _BEST, 0.447, {}, (0,)),
    RetrofitArm("sink_in_block", f"{_words(_BLOCK_SINK)}, A 0.05", _BLOCK_SINK, 0.05, {}, (0,)),
    RetrofitArm("negative", f"{_words(_BLOCK_SINK)}, A 0.447", _BLOCK_SINK, 0.447, {}, (0,)),
]  # fmt: skip
_GATES_ONLY = {"training.frozen": _GATES, "training.max_steps": _GATE_STEPS, "training.injection_lr": 1e-2}
GATES = [
    RetrofitArm("gates", f"{_words(_BEST)}, A 0.05: gates only", _BEST, 0.05, _GATES_ONLY),
    RetrofitArm("gates_control", "1 loop, gates only, equal tokens", _BEST, 0.05, {**_GATES_ONLY, **_ONCE}),
    RetrofitArm("gates_compute", "1 loop, gates only, equal compute", _BEST, 0.05,
                {**_GATES_ONLY, **_ONCE, "training.max_steps": round(_GATE_STEPS * _GATE_COMPUTE)}),
]  # fmt: skip
ARMS = {"cpu": [*UNTRAINED, *TRAINED, *GATES], "untrained": UNTRAINED}


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """The runs by arm and seed."""
    return {(arm.name, seed): _spec(arm, seed) for arm in ARMS[scale] for seed in arm.seeds}


def _spec(arm: RetrofitArm, seed: int) -> RunSpec:
    prelude, recurrent, coda = arm.cut
    cut = recipe_cut({"decay": arm.decay}, {"prelude": prelude, "recurrent": recurrent, "coda": coda})
    named = {"n_experts" if name == "experts" else name: value for name, value in cut.items()}
    model = retrofit_config(_SOURCE, Cut(**named))  # type: ignore[arg-type]
    own = {f"model.{name}": value for name, value in model.model_dump(mode="json").items()}
    settings = {**_ALONE, "training.seed": seed, "training.dtype": "float32", **(arm.training or {})}
    if arm.training is not None:
        settings["training.dtype"] = fastest_dtype()
    data = {"data.datasets": [{"prefix": "smollm"}], "data.tokenizer": "none"}
    recipe = recipe_overrides(model)
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**own, **data}.items()]
    overrides += [*recipe, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    config = load_config("tiny", overrides).config
    raw = config.model_dump(mode="json", exclude={"deepspeed", "cluster"}, exclude_defaults=True)
    trained = arm.training is not None
    sequences = _SEQUENCES["trained" if trained else "untrained"]
    task = {"worker": WORKER, "cut": cut, "sequences": sequences, "train": trained}
    loops = (1,) if config.model.mean_recurrence == 1 else LOOPS
    return RunSpec(raw, None, task, loops)


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """The grid of cuts and A, and the trained arms beside their controls."""
    tables = [("Not trained: loss less that of the source (one loop), at 2, 4 and 8 loops", _grid(results))]
    pictures = [("untrained.png", lambda path: _draw_grid(results, path))]
    if scale == "cpu":
        tables.append(("Trained", _trained(results, TRAINED, "control", "control_compute")))
        tables.append(("Gates only", _trained(results, GATES, "gates_control", "gates_compute")))
        pictures.append(("retrofit.png", lambda path: _draw_trained(results, path)))
    kept = ("loss", "sequences", "seconds", "core_seconds", "tokens", "decay")
    numbers = {f"{arm}/{seed}": {name: own[name] for name in kept} for (arm, seed), own in results.items()}
    return Report(numbers, tables, pictures)


def _less(own: Result, loops: int, other: Result, others: int = 1) -> str:
    mean, error = paired(own["sequences"][str(loops)], other["sequences"][str(others)])
    return f"{mean:+.4f} ± {error:.4f}"


def _grid(results: Results) -> list[list[str]]:
    rows = [["cut", *(f"A {decay:g}" for decay in DECAYS)]]
    for cut in CUTS:
        for loops in LOOPS[1:]:
            cells = []
            for decay in DECAYS:
                own = results[f"untrained/{'-'.join(map(str, cut))}/{decay:g}", 0]
                cells.append(_less(own, loops, own))
            rows.append([f"{_words(cut)}, {loops} loops", *cells])
    return rows


def _trained(results: Results, arms: Sequence[RetrofitArm], control: str, compute: str) -> list[list[str]]:
    """A line per arm and seed. Differences are paired by sequence; the loop's is that at 2 loops."""
    rows = [["arm", "seed", "tokens", "core-seconds", *(f"{n} loops" for n in LOOPS), "2 loops less own 1",
             "2 less control, equal tokens", "2 less control, equal compute"]]  # fmt: skip
    for arm in arms:
        for seed in arm.seeds:
            own = results[arm.name, seed]
            losses = [f"{own['loss'][str(n)]:.4f}" if str(n) in own["loss"] else "" for n in LOOPS]
            differences = ["", "", ""]
            if "2" in own["loss"]:
                others = (own, results[control, seed], results[compute, seed])
                differences = [_less(own, 2, other) for other in others]
            cost = [f"{own['tokens']:,}", f"{own['core_seconds']:.0f}"]
            rows.append([arm.label, str(seed), *cost, *losses, *differences])
    return rows


def _draw_grid(results: Results, path: Path) -> None:
    """Loss less the source's against A, a panel per cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, cut in zip(figure.subplots(1, len(CUTS), sharey=True), CUTS, strict=True):
        for index, loops in enumerate(LOOPS[1:]):
            owns = [results[f"untrained/{'-'.join(map(str, cut))}/{decay:g}", 0] for decay in DECAYS]
            points = [paired(own["sequences"][str(loops)], own["sequences"]["1"]) for own in owns]
            means, errors = zip(*points, strict=True)
            axes.errorbar(DECAYS, means, errors, fmt="o-", ms=3, lw=1.2, color=f"C{index}", label=f"{loops} loops")
        axes.axhline(0, color="grey", lw=0.8)
        axes.set_xscale("log")
        axes.set(xlabel="A at the start", title=_words(cut))
    axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("loss less the source's (nats)")
    figure.savefig(path, dpi=110)


def _draw_trained(results: Results, path: Path) -> None:
    """Loss of the trained arms against loops, and of their controls as lines, seed 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(TRAINED):
        loss = results[arm.name, 0]["loss"]
        if len(loss) == 1:
            axes.axhline(loss["1"], color=f"C{index}", ls="--", lw=1, label=arm.label)
        else:
            axes.plot([int(n) for n in loss], list(loss.values()), "o-", ms=4, color=f"C{index}", label=arm.label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="loops", ylabel="held-out loss (nats per token)", title="trained, seed 0")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


STUDY = Study("retrofit", "What makes the loops of a model that is cut from a dense one useful?", runs, analyse,
              scales=tuple(ARMS), needs=lambda: require_source(CACHE))  # fmt: skip
