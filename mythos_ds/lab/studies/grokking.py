"""Facts and what follows from two of them: when does a looped model memorise, generalise, and compose facts that it has
only ever seen alone?

The three stages are those of Wang et al. 2026 (arXiv 2604.07822), who find the third in looped models only, after
thousands of epochs on 2,000 entities and 200 relations.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.study import Report, Results, Study, by_arm, spread
from mythos_ds.lab.tasks.facts import LENGTH, FactTask, guesses

WORKER = "mythos_ds.lab.tasks.facts"
MEAN = 4
LOOPS = (1, 2, 4, 8, 16)
LEARNED = 0.9
STAGES = {"train": "memorised", "held_out": "in distribution", "ood": "out of distribution"}
"""The three stages, by the split whose accuracy reaches LEARNED."""

_COLORS = {"train": "tab:gray", "held_out": "tab:blue", "ood": "tab:red"}

_BASE: dict[str, Any] = {
    "training.seq_len": LENGTH,
    "training.lr": 2e-3,
    # Grokking is what weight decay does to a model that has memorised (Power et al. 2022, arXiv 2201.02177).
    "training.weight_decay": 1.0,
    "training.schedule": "wsd",
    "training.decay_fraction": 0.3,
    "training.min_lr_ratio": 0.0,
    "training.warmup_steps": 100,
    "training.depth_distribution": "lognormal_poisson",
    "training.mean_backprop_depth": 2 * MEAN,
    "training.balance_loss": 0.0,
    "training.z_loss": 0.0,
    "training.eval_batches": 1,
    "model.qk_norm": False,
    "model.prelude_layers": 1,
    "model.coda_layers": 0,
    "model.max_loops": 2 * MEAN,
    "model.mean_recurrence": MEAN,
    # One expert that is always chosen is a dense layer: facts are memories, and routing is another study's question.
    "model.n_experts": 1,
    "model.n_experts_per_tok": 1,
    "model.n_shared_experts": 0,
    "model.loop_embedding": "none",
    "model.lora_rank": 0,
    "model.embedding_std": 0.5,
    # The entity reached after one fact should look like the entity that another fact starts at.
    "model.tie_embeddings": True,
    "model.n_heads": 4,
    "model.n_kv_heads": 4,
}
_ONCE = {
    "model.mean_recurrence": 1,
    "model.max_loops": 1,
    "training.depth_distribution": "fixed",
    "training.mean_backprop_depth": 1,
}

ARMS = (
    Arm("looped", f"looped, random T (mean {MEAN})"),
    Arm("once", "the same two layers, T = 1", _ONCE),
    Arm("fixed", f"looped, T = {MEAN} always", {"training.depth_distribution": "fixed"}),
)
ARMS_OF = {"cpu": ARMS[:2], "gpu": ARMS}
SEEDS = {"cpu": (0, 1), "gpu": (0, 1, 2)}

# (entities, relations, degree, share of facts apart, share of queries held out), width, batch, steps
SIZES: dict[str, tuple[tuple[int, int, int, float, float], int, int, int]] = {
    "cpu": ((32, 10, 10, 0.2, 0.1), 64, 128, 5000),
    "gpu": ((500, 50, 10, 0.1, 0.1), 256, 2048, 16_000),
}


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """The runs by (arm, seed); each seed has its own graph and split."""
    graph, dim, batch, steps = SIZES[scale]
    size = {
        "model.dim": dim,
        "model.ffn_dim": 2 * dim,
        "model.expert_dim": 4 * dim,
        "training.lr_reference_dim": dim,
        "training.micro_batch_size": batch,
        "training.global_batch_size": batch,
        "training.max_steps": steps,
    }
    specs = {}
    for arm in ARMS_OF[scale]:
        loops = (1,) if arm.name == "once" else LOOPS
        for seed in SEEDS[scale]:
            task = {"worker": WORKER, **asdict(FactTask(*graph, graph_seed=seed))}
            specs[arm.name, seed] = make_spec({**_BASE, **size}, arm, seed, loops=loops, data_dir=data_dir, chains=task)
    return specs


def reached(history: list[tuple[int, dict[str, float]]], split: str) -> int | None:
    """The first measured step at which the accuracy on `split` is at least LEARNED."""
    return next((step for step, shares in history if shares[split] >= LEARNED), None)


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Accuracy over steps, the step at which each stage is reached, and accuracy by loop count at the end."""
    numbers: dict[str, Any] = {}
    steps_head = [f"{name} ({split})" for split, name in STAGES.items()]
    stages = [["arm", "parameters", *steps_head, "seconds"]]
    ends = [["arm", "T", "facts", "train", "held out", "out of distribution"]]
    for arm in ARMS_OF[scale]:
        own = by_arm(results, arm.name)
        numbers[arm.name] = [_summary(result) for result in own]
        reach = [" / ".join(_step(summary["reached"][split]) for summary in numbers[arm.name]) for split in STAGES]
        seconds = spread([result["seconds"] for result in own], 0)
        stages.append([arm.label, f"{own[0]['parameters']:,}", *reach, seconds])
        for n_loops in own[0]["final"]:
            finals = [result["final"][n_loops] for result in own]
            cells = [spread([100 * final[split] for final in finals], 1) for split in ("atomic", *STAGES)]
            ends.append([arm.label, n_loops, *cells])
    graphs = [FactTask(*SIZES[scale][0], graph_seed=seed).splits() for seed in SEEDS[scale]]
    for name, commonest in (("a random", False), ("the commonest", True)):
        blind = [guesses(splits, commonest=commonest) for splits in graphs]
        numbers[f"guess: {name} tail"] = blind
        cells = [spread([100 * shares[split] for shares in blind], 1) for split in ("atomic", *STAGES)]
        ends.append([f"guess: {name} tail of the last relation", "", *cells])
    guess = sum(shares["ood"] for shares in blind) / len(blind)
    count = len(SEEDS[scale])
    tables = [
        (f"First measured step with at least {LEARNED:.0%} right answers, by seed", stages),
        (f"Accuracy in % after the last step, mean and standard deviation over {count} seeds", ends),
    ]
    return Report(numbers, tables, [("grokking.png", lambda path: draw(results, scale, guess, path))])


def _step(step: int | None) -> str:
    return "not reached" if step is None else f"{step:,}"


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    history = result["history"]
    return {
        "reached": {split: reached(history, split) for split in STAGES},
        "history": [[step, {name: round(share, 4) for name, share in shares.items()}] for step, shares in history],
        "final": result["final"],
        "parameters": result["parameters"],
        "training_flops": result["training_flops"],
        "seconds": round(result["seconds"], 1),
    }


def draw(results: Results, scale: str, guess: float, path: Path) -> None:
    """Accuracy against steps: a panel for each arm, a line for each seed, dashes where a stage is reached (geometric
    mean of the seeds), dots at the share that a `guess` gets, grey where the learning rate falls."""
    from matplotlib.figure import Figure

    arms = ARMS_OF[scale]
    figure = Figure(figsize=(4.6 * len(arms) + 1.8, 4.0), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    total = SIZES[scale][-1]
    for axes, arm in zip(panels, arms, strict=True):
        for split, name in STAGES.items():
            for number, result in enumerate(by_arm(results, arm.name)):
                steps, shares = zip(*((step, 100 * shares[split]) for step, shares in result["history"]), strict=True)
                label = name if number == 0 else None
                axes.plot(steps, shares, color=_COLORS[split], lw=1.4, alpha=0.85, label=label)
            whens = [reached(result["history"], split) for result in by_arm(results, arm.name)]
            if known := [when for when in whens if when is not None]:
                mean = math.exp(sum(map(math.log, known)) / len(known))
                axes.axvline(mean, color=_COLORS[split], lw=0.9, ls="--")
        axes.axhline(100 * guess, color="black", lw=0.8, ls=":", label="guess: last relation's\ncommonest tail")
        axes.axvspan(total * (1 - _BASE["training.decay_fraction"]), total, color="black", alpha=0.07, lw=0)
        axes.set(title=arm.label, xlabel="optimizer steps", xscale="log", ylim=(-2, 104))
    panels[0].set_ylabel("right answers (%), a line for each seed")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)


STUDY = Study("grokking", "Are facts composed that were only ever seen alone?", runs, analyse)
