"""Depth extrapolation on permutation chains: trained on at most 5 hops, tested to 20 hops at 1 to 48 loops.

The recipe (sizes, packing, learning rate) is that of a pilot of ours; the controls are those a referee asks for: the
same parameters and the same FLOPs without a loop, a loop without input, a fixed loop count.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.study import Report, Results, Study, by_arm, spread
from mythos_ds.lab.tasks.chains import ChainTask, frontier, slope

LOOPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 48)
SEEDS = (0, 1, 2)
TRAIN_HOPS, TEST_HOPS = 5, 20
MEAN = 6

_TRAINING: dict[str, Any] = {
    "training.seq_len": TEST_HOPS + 1,
    "training.lr": 2e-3,
    "training.weight_decay": 0.01,
    "training.schedule": "wsd",
    "training.warmup_steps": 100,
    "training.decay_fraction": 0.3,
    "training.min_lr_ratio": 0.0,
    "training.depth_distribution": "lognormal_poisson",
    "training.mean_backprop_depth": 12,
    "training.balance_loss": 0.0,
    "training.z_loss": 0.0,
    "training.router_bias_rate": 2e-3,
    "training.eval_batches": 4,
}
_MODEL: dict[str, Any] = {
    "model.qk_norm": False,
    "model.prelude_layers": 1,
    "model.coda_layers": 0,
    "model.max_loops": 12,
    "model.mean_recurrence": MEAN,
    "model.n_experts": 16,
    "model.n_experts_per_tok": 2,
    "model.n_shared_experts": 1,
    "model.loop_embedding": "none",
    "model.lora_rank": 0,
    "model.embedding_std": 0.5,
    "model.n_heads": 4,
    "model.n_kv_heads": 4,
}


def _size(dim: int, batch: int, steps: int) -> dict[str, Any]:
    return {
        "model.dim": dim,
        "model.ffn_dim": 3 * dim,
        "model.expert_dim": dim // 2,
        "training.lr_reference_dim": dim,
        "training.micro_batch_size": batch,
        "training.global_batch_size": batch,
        "training.max_steps": steps,
    }


def _unlooped(layers: int, width: int) -> dict[str, Any]:
    """`layers` distinct dense layers: a layer of one expert that is always chosen is a dense one."""
    return {
        "model.prelude_layers": layers - 1,
        "model.n_experts": 1,
        "model.n_experts_per_tok": 1,
        "model.n_shared_experts": 0,
        "model.expert_dim": width,
        "model.mean_recurrence": 1,
        "model.max_loops": 1,
        "training.depth_distribution": "fixed",
        "training.mean_backprop_depth": 1,
    }


_MLA = {
    "model.attn_type": "mla",
    "model.n_kv_heads": None,
    "model.kv_lora_rank": 32,
    "model.qk_nope_head_dim": 16,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 16,
}


def arms(dim: int) -> list[Arm]:
    """All arms at model width `dim`; the first three are the headline."""
    return [
        Arm("looped", "looped MoE, random T (mean 6, at most 12)"),
        Arm("equal_flops", "7 distinct dense layers (equal FLOPs at T = 6)", _unlooped(7, 3 * dim)),
        Arm("equal_parameters", "3 distinct dense layers (equal parameters)", _unlooped(3, 3 * dim)),
        Arm("fixed", "looped MoE, T = 6 always", {"training.depth_distribution": "fixed"}),
        Arm("dense_core", "looped dense layer", {"model.n_experts": 1, "model.n_experts_per_tok": 1,
                                                 "model.n_shared_experts": 0, "model.expert_dim": 3 * dim}),
        Arm("no_input", "looped MoE, no injection", control="no_input"),
        Arm("decayed_no_input", "looped MoE, no injection, state decays by A", control="decayed_no_input"),
        Arm("truncated", "looped MoE, gradient in the last 3 loops", {"training.mean_backprop_depth": 3}),
        Arm("act", "looped MoE, ACT", {"model.halting": "act", "training.ponder_cost": 1e-3}),
        Arm("identity", "looped MoE, loop embedding and LoRA (rank 4)",
            {"model.loop_embedding": "scaled", "model.lora_rank": 4}),
        Arm("mla", "looped MoE, MLA", _MLA),
        Arm("post", "looped MoE, injection after the layers", {"model.injection": "post"}),
    ]  # fmt: skip


SIZES: dict[str, dict[str, tuple[int, int, int, int, int]]] = {
    # (entities, relations, width, batch, steps)
    "cpu": {"S8 R6": (8, 6, 64, 96, 450), "S16 R8": (16, 8, 64, 96, 900)},
    "gpu": {"S16 R8": (16, 8, 128, 256, 2000), "S64 R8": (64, 8, 256, 512, 6000)},
    "smoke": {"S4 R3": (4, 3, 48, 64, 240)},
}
_HEADLINE = 3


def seeds(scale: str) -> tuple[int, ...]:
    """Seeds of a scale; "smoke" shows that the study works, in a minute."""
    return (0,) if scale == "smoke" else SEEDS


def base(dim: int, batch: int, steps: int) -> dict[str, Any]:
    """The configuration that the arms of a size override."""
    return {**_TRAINING, **_MODEL, **_size(dim, batch, steps)}


def _arms_of(scale: str, size_number: int, dim: int) -> list[Arm]:
    """All arms at the first size; the headline's at the others."""
    return arms(dim)[: _HEADLINE if size_number or scale == "smoke" else None]


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """The runs by (size/arm, seed); each seed has its own permutations."""
    specs = {}
    for number, (size, (entities, relations, dim, batch, steps)) in enumerate(SIZES[scale].items()):
        for arm in _arms_of(scale, number, dim):
            for seed in seeds(scale):
                task = ChainTask(entities, relations, TRAIN_HOPS, TEST_HOPS, table_seed=seed)
                loops = (1,) if arm.overrides.get("model.mean_recurrence") == 1 else LOOPS
                specs[f"{size}/{arm.name}", seed] = make_spec(
                    base(dim, batch, steps), arm, seed, loops=loops, data_dir=data_dir, chains=asdict(task)
                )
    return specs


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Accuracy by hops and loops, the frontier and its slope, and the acceptance figures."""
    numbers: dict[str, Any] = {}
    tables = []
    for size in SIZES[scale]:
        rows = [["arm", "parameters", "5 hops, T=6", "10 hops, T=6", "T=8", "T=12", "T=24", "T=48", "20 hops, T=24",
                 "frontier at T=6", "T=12", "hops per loop, T=4..16", "seconds"]]  # fmt: skip
        for arm in arms(SIZES[scale][size][2]):
            own = by_arm(results, f"{size}/{arm.name}")
            if own:
                numbers[f"{size}/{arm.name}"] = [_summary(result) for result in own]
                rows.append([arm.label, *_cells(own)])
        tables.append((f"{size}: accuracy in %, mean and standard deviation over {len(seeds(scale))} seeds", rows))
    pictures = [("khop.png", lambda path: draw(results, scale, path))]
    return Report(numbers, tables, pictures)


def _accuracies(result: dict[str, Any]) -> dict[int, list[float]]:
    return {int(loops): values for loops, values in result["accuracy"].items()}


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    accuracies = _accuracies(result)
    front = frontier(accuracies)
    return {
        "accuracy": {loops: [round(value, 4) for value in values] for loops, values in accuracies.items()},
        "frontier": front,
        "hops_per_loop": slope({loops: hops for loops, hops in front.items() if 4 <= loops <= 16}, TEST_HOPS),
        "parameters": result["parameters"],
        "training_flops": result["training_flops"],
        "seconds": round(result["seconds"], 1),
    }


def _cells(own: list[dict[str, Any]]) -> list[str]:
    summaries = [_summary(result) for result in own]

    def percent(loops: int, hops: int) -> str:
        tables = [summary["accuracy"] for summary in summaries]
        if len(tables[0]) == 1:  # no loop to turn: the one depth it has, shown once
            loops = 1 if loops == MEAN else 0
        return spread([100 * table[loops][hops - 1] for table in tables], 0) if loops in tables[0] else ""

    def front(loops: int) -> str:
        return spread([summary["frontier"].get(loops, summary["frontier"][1]) for summary in summaries], 0)

    slopes = [summary["hops_per_loop"] for summary in summaries if summary["hops_per_loop"] is not None]
    return [
        f"{summaries[0]['parameters']:,}",
        percent(6, 5), percent(6, 10), percent(8, 10), percent(12, 10), percent(24, 10), percent(48, 10),
        percent(24, 20), front(6), front(12) if len(summaries[0]["frontier"]) > 1 else "",
        spread(slopes, 2) if slopes else "",
        spread([summary["seconds"] for summary in summaries], 0),
    ]  # fmt: skip


def draw(results: Results, scale: str, path: Path) -> None:
    """Accuracy against hops: the looped model at several loop counts, and the models without a loop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(SIZES[scale]) + 2.2, 4.2), layout="constrained")
    panels = figure.subplots(1, len(SIZES[scale]), sharey=True, squeeze=False)[0]
    hops = range(1, TEST_HOPS + 1)
    for axes, (size, (entities, relations, *_)) in zip(panels, SIZES[scale].items(), strict=True):
        looped = by_arm(results, f"{size}/looped")
        shown = [loops for loops in (4, 6, 8, 12, 16, 24, 48) if str(loops) in looped[0]["accuracy"]]
        for index, loops in enumerate(shown):
            _band(axes, hops, looped, loops, f"looped, T = {loops}", ("viridis", index / len(shown)), "-")
        for name, style in (("equal_flops", "--"), ("equal_parameters", ":")):
            label = {"equal_flops": "7 layers, equal FLOPs", "equal_parameters": "3 layers, equal parameters"}[name]
            _band(axes, hops, by_arm(results, f"{size}/{name}"), 1, label, ("Reds", 0.8), style)
        axes.axvline(TRAIN_HOPS + 0.5, color="grey", lw=0.8)
        axes.text(TRAIN_HOPS + 0.7, 102, "never trained", fontsize=8, color="grey")
        axes.axhline(100 / entities, color="grey", lw=0.8, ls=":")
        axes.set(title=f"{entities} entities, {relations} relations", xlabel="hops", ylim=(0, 106))
        axes.set_xticks(range(2, TEST_HOPS + 1, 2))
    panels[0].set_ylabel("accuracy (%), mean and range of seeds")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)


def _band(axes: Any, hops: range, own: list[dict[str, Any]], loops: int, label: str, color: Any, style: str) -> None:
    from matplotlib import colormaps

    if not own:
        return
    curves = [[100 * value for value in result["accuracy"][str(loops)]] for result in own]
    chosen = colormaps[color[0]](color[1])
    low, high = ([edge(values) for values in zip(*curves, strict=True)] for edge in (min, max))
    axes.fill_between(hops, low, high, color=chosen, alpha=0.2, lw=0)
    axes.plot(hops, [sum(v) / len(v) for v in zip(*curves, strict=True)], style, color=chosen, label=label, lw=1.4)


STUDY = Study("khop", "Does looping buy depth?", runs, analyse, scales=("cpu", "gpu", "smoke"))
