"""Whether a training stage on longer sequences, with YaRN (arXiv 2309.00071), extends the context of a looped model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_ds.analysis.loop_losses import paired
from mythos_ds.lab.spec import Arm, RunSpec, make_spec
from mythos_ds.lab.study import Report, Results, Study, spread

WORKER = "mythos_ds.lab.context_worker"
SHORT, LONG = 512, 2048
_NEAR, _FAR = 1, 3
"""The parts 256 - 511 and 1,024 - 2,047 of a document."""
YARN = {"rope_type": "yarn", "factor": LONG / SHORT, "original_max_position_embeddings": SHORT}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"batch": 8, "steps": 400, "stage_steps": 100, "seeds": (0, 1, 2), "documents": 48, "overrides": {}},
    "gpu": {
        "batch": 64, "steps": 3000, "stage_steps": 750, "seeds": (0, 1, 2), "documents": 60,
        "overrides": {"model.dim": 512, "model.ffn_dim": 1536, "model.expert_dim": 256, "training.dtype": "bfloat16"},
    },
}  # fmt: skip
_ROWS = 4
LABELS = {
    "base": "trained at 512",
    "more": "512, as many tokens more",
    "more_yarn": "the same, read with YaRN it was not trained with",
    "plain": "stage at 2,048, RoPE as it was",
    "yarn": "stage at 2,048 with YaRN",
}


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """A run per seed, which holds all arms: they start from one model."""
    size = SIZES[scale]
    base = {
        "training.seq_len": SHORT, "training.global_batch_size": size["batch"],
        "training.micro_batch_size": _ROWS, "training.max_steps": size["steps"],
        "training.schedule": "wsd", "training.decay_fraction": 0.0, "training.eval_batches": 1,
        "training.eval_interval": 0, "data.split": [90, 10, 0], **size["overrides"],
    }  # fmt: skip
    stage = {
        "training.max_steps": size["stage_steps"], "training.warmup_steps": 0, "training.decay_fraction": 1.0,
        "training.min_lr_ratio": 0.0,
    }  # fmt: skip
    longer = {
        "training.seq_len": LONG, "training.global_batch_size": size["batch"] * SHORT // LONG,
        "training.micro_batch_size": max(1, _ROWS * SHORT // LONG),
    }  # fmt: skip
    task = {
        "worker": WORKER,
        "length": LONG,
        "documents": size["documents"],
        "arms": {"more": stage, "plain": stage | longer, "yarn": stage | longer | {"model.rope_scaling": YARN}},
        "scaled": {"more_yarn": ("more", YARN)},
    }
    specs = {}
    for seed in size["seeds"]:
        spec = make_spec(base, Arm("context", ""), seed, loops=(), data_dir=data_dir)
        specs["context", seed] = RunSpec(spec.config, None, task, ())
    return specs


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Loss by position of every arm, and the far part less the near one."""
    numbers = {str(seed): result for (_, seed), result in sorted(results.items())}
    parts = next(iter(numbers.values()))["parts"]
    heads = [f"{start:,} - {end - 1:,}" for start, end in parts]
    rows = [["arm", *heads, "1,024 - 2,047 less 256 - 511", "error over documents, seed 0"]]
    for arm, label in LABELS.items():
        means = [_means(result["arms"][arm]) for result in numbers.values()]
        columns = [spread([own[part] for own in means], 4) for part in range(len(parts))]
        documents = numbers["0"]["arms"][arm]
        error = paired([own[_FAR] for own in documents], [own[_NEAR] for own in documents])[1]
        rows.append([label, *columns, spread([own[_FAR] - own[_NEAR] for own in means], 4), f"{error:.4f}"])
    return Report(
        numbers,
        [("Held-out loss (nats per token) by position in a document; mean and deviation over seeds", rows)],
        [("context.png", lambda path: _draw(numbers, path))],
    )


def _means(documents: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*documents, strict=True)]


def _draw(numbers: Mapping[str, Any], path: Path) -> None:
    """Loss against the position, mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = next(iter(numbers.values()))["parts"]
    centres = [(start + end) / 2 for start, end in parts]
    for index, (arm, label) in enumerate(LABELS.items()):
        columns = list(zip(*(_means(result["arms"][arm]) for result in numbers.values()), strict=True))
        low, high = ([edge(column) for column in columns] for edge in (min, max))
        axes.fill_between(centres, low, high, alpha=0.15, lw=0, color=f"C{index}")
        axes.plot(centres, [sum(c) / len(c) for c in columns], "o-", ms=4, color=f"C{index}", label=label)
    axes.axvline(SHORT, color="grey", lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the document (dotted: length of the base's training)", ylabel="held-out loss (nats)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study(
    "context", "Does a stage on longer sequences extend the context of a looped model?", runs, analyse, limit_s=7200.0
)
