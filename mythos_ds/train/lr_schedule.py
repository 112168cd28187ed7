"""Learning-rate schedules as pure functions of the step and the run's planned lengths.

A run that is extended has more than one planned length. The rate then follows the schedule of the new length over
the whole run (a decay that already happened is undone), reached by a linear ramp of `warmup_steps` from the rate
at which the run stood: the re-warming and re-decaying of Ibrahim et al., "Simple and Scalable Strategies to
Continually Pre-train Large Language Models", arXiv 2403.08763. Extending a wsd run before its decay changes nothing.

A training stage has a schedule over its own length, in which steps count from its start. Its warm-up begins at the rate
at which the stage before it ended, in the first stage at zero; without warm-up it begins at its own rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mythos_ds.config.schema import TrainingConfig


@dataclass(frozen=True)
class PlannedLength:
    """From step `from_step` on, the run was planned to end after `total_steps` steps."""

    from_step: int
    total_steps: int


def schedule_factor(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Share of the peak rate at `step` (0 is the first) of a run of `total_steps`, warm-up included.

    wsd: constant, then over the last `decay_fraction` a fall by 1 - sqrt (Haegele et al., arXiv 2405.18392).
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    floor = training.min_lr_ratio
    if training.schedule == "cosine":
        progress = _progress(step, training.warmup_steps, total_steps)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_start = total_steps - round(training.decay_fraction * total_steps)
    progress = _progress(step, max(decay_start, training.warmup_steps), total_steps)
    return 1.0 - (1.0 - floor) * math.sqrt(progress)


def learning_rate(
    step: int, training: TrainingConfig, lengths: Sequence[PlannedLength], start_lr: float = 0.0
) -> float:
    """Peak-width learning rate of optimizer step `step` of a training stage, see the module's docstring for extended
    runs and for stages.

    `lengths` is in order of `from_step` and starts at step 0. start_lr: the rate that the warm-up begins at. The engine
    scales the rate by width.
    """
    active = [length for length in lengths if length.from_step <= step]
    current = active[-1]
    factor = schedule_factor(step, current.total_steps, training)
    target = training.lr * factor
    if start_lr and step < training.warmup_steps:
        target = start_lr + (training.lr - start_lr) * factor
    if len(active) == 1 or training.warmup_steps == 0:
        return target
    before = learning_rate(max(0, current.from_step - 1), training, active[:-1], start_lr)
    ramp = min(1.0, (step - current.from_step + 1) / training.warmup_steps)
    return before + (target - before) * ramp


def _progress(step: int, start: int, end: int) -> float:
    """How far the last step of a fall from `start` to `end` is reached, 0..1; the last step itself is 1."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / max(1, end - start))
