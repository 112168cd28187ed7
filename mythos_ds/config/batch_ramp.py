"""The sequences of each optimizer step: one global batch size, or a ramp up to it. No torch."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from mythos_ds.config.schema import BatchRamp, TrainingConfig

MAX_SIZES = 10_000


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch size as a function of the step, counted from 0 at the ramp's start.

    With a ramp, step s has start + increment * floor(n * c / samples) sequences until it has `size`, where c are the
    sequences of all steps before it and n = (size - start) / increment: the rule of Megatron-LM's
    --rampup-batch-size.
    """

    size: int
    ramp: BatchRamp | None = None

    @classmethod
    def of(cls, training: TrainingConfig) -> "BatchSchedule":
        """The schedule that a configuration asks for."""
        return cls(training.global_batch_size, training.global_batch_ramp)

    def at(self, step: int) -> int:
        """Sequences of optimizer step `step`."""
        return self._level(step)[2]

    def samples(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        first_step, first_sample, size = self._level(step)
        return first_sample + (step - first_step) * size

    def steps(self, samples: int) -> int:
        """The fewest steps that have `samples` sequences."""
        levels = _levels(self.size, self.ramp)
        first_step, first_sample, size = next(level for level in reversed(levels) if level[1] <= samples)
        return first_step - (first_sample - samples) // size

    def sizes(self) -> list[int]:
        """Every size that a step has, ascending."""
        return [size for _, _, size in _levels(self.size, self.ramp)]

    def _level(self, step: int) -> tuple[int, int, int]:
        levels = _levels(self.size, self.ramp)
        return levels[max(0, bisect_right(levels, step, key=lambda level: level[0]) - 1)]


@lru_cache
def _levels(size: int, ramp: BatchRamp | None) -> tuple[tuple[int, int, int], ...]:
    """(first step, sequences before it, size) of each size; no ramp for one that the rules refuse."""
    if ramp is None or ramp.start >= size or (size - ramp.start) % ramp.increment:
        return ((0, 0, size),)
    increments = (size - ramp.start) // ramp.increment
    if increments > MAX_SIZES:
        return ((0, 0, size),)
    levels, step, samples = [], 0, 0
    for number in range(increments):
        here = ramp.start + number * ramp.increment
        end = -(-(number + 1) * ramp.samples // increments)  # sequences from which on the next size is due
        if end > samples:
            levels.append((step, samples, here))
            steps = -(-(end - samples) // here)
            step, samples = step + steps, samples + steps * here
    return (*levels, (step, samples, size))
