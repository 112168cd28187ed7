"""Learning-rate stress: which way of bringing the input into the loop survives a learning rate five times too high?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_ds.lab.spec import Arm, RunSpec
from mythos_ds.lab.studies import language
from mythos_ds.lab.studies.language import MEAN, finished, loss_at
from mythos_ds.lab.study import Report, Results, Study, by_arm, spread

_INJECTIONS = [
    ("lti", "A h + B e, rho(A) < 1", None),
    ("penalty", "the same with a Jacobian penalty", "jacobian_penalty"),
    ("addition", "h + e", "addition"),
    ("concat", "W [h; e]", "concat"),
]
FACTORS = (1, 5)
_STEPS = {"training.max_steps": 100, "training.warmup_steps": 5}
_LEARNING_RATE = 4e-3


def arms() -> list[Arm]:
    """Every injection at every factor."""
    return [
        Arm(f"{name}/{factor}", f"{label}, lr x{factor}",
            {**_STEPS, "training.lr": factor * _LEARNING_RATE}, control)
        for name, label, control in _INJECTIONS
        for factor in FACTORS
    ]  # fmt: skip


def runs(scale: str, data_dir: str) -> dict[tuple[str, int], RunSpec]:
    """The runs by (injection/factor, seed)."""
    return language.runs(arms(), scale, data_dir)


def has_diverged(result: Mapping[str, Any], vocabulary: int) -> bool:
    """Not finite, or at the end no better than guessing all tokens alike."""
    return "diverged" in result or loss_at(dict(result), MEAN) > math.log(vocabulary)


def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Runs that diverged, losses, gradient norms, and what depth does to each."""
    vocabulary = language.configuration(language.base(scale)).model.vocab_size
    rows = [["arm", "diverged", "loss at T", "PPL(8T)/PPL(T)", "largest loss after warm-up", "state rms, last loop"]]
    numbers = language.numbers(results, arms())
    for arm in arms():
        own = by_arm(results, arm.name)
        ended = finished(results, arm.name)
        bad = sum(has_diverged(result, vocabulary) for result in own)
        numbers[f"diverged/{arm.name}"] = bad
        cells = ["", "", "", ""]
        if ended:
            deep = [math.exp(min(50.0, loss_at(r, 8 * MEAN) - loss_at(r, MEAN))) for r in ended]
            cells = [
                spread([loss_at(result, MEAN) for result in ended], 3),
                spread(deep, 3),
                f"{max(_worst(result['curve']) for result in ended):.2f}",
                spread([result["last"]["state/rms_per_loop"][-1] for result in ended], 2),
            ]
        rows.append([arm.label, f"{bad} of {len(own)}", *cells])
    return Report(
        numbers,
        [("Learning-rate stress, three seeds", rows)],
        [("stress.png", lambda path: draw(results, path))],
    )


def _worst(curve: Sequence[Sequence[float]]) -> float:
    return max(loss for step, loss in curve if step > _STEPS["training.warmup_steps"])


def draw(results: Results, path: Path) -> None:
    """Training loss by step, one panel per learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(FACTORS), sharey=True)
    for axes, factor in zip(panels, FACTORS, strict=True):
        for index, (name, label, *_) in enumerate(_INJECTIONS):
            for seed, result in enumerate(by_arm(results, f"{name}/{factor}")):
                steps, losses = zip(*result["curve"], strict=True)
                axes.plot(steps, losses, lw=1, color=f"C{index}", label=label if seed == 0 else None)
        axes.set(title=f"learning rate x{factor}", xlabel="step", yscale="log")
    panels[0].set_ylabel("training loss (nats per token)")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


STUDY = Study("stress", "Which injection survives a learning rate five times too high?", runs, analyse)
