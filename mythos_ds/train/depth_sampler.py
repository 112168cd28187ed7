"""How many loops a training step runs: a function of (seed, optimizer step) only, or one count per sequence, a function
of (seed, sample number) and of the step as far as the distribution's mean still grows.

All micro-batches, ranks and layouts of a step get the same counts without communication, and a resumed run goes on with
the same sequence.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.depth_distribution import FRESH, StageStart, growing_mean
from mythos_ds.config.schema import RunConfig

_STREAM = 0x6D797468
_SEQUENCE_STREAM = _STREAM << 64


@dataclass(frozen=True)
class DepthSampler:
    """The loop counts of a run, in [1, max_loops].

    lognormal_poisson: Poisson(exp(tau)), tau ~ N(log mean - sigma^2/2, sigma) (Geiping et al. 2025, without their
    offset); poisson: Poisson(mean); uniform: 1 .. 2 mean - 1; fixed: mean. All but fixed are clipped. The mean grows
    over the first `curriculum_steps` (see `growing_mean`). `sequences`: how many sequences of a step draw a count of
    their own (Parcae, arXiv 2604.12946); None = one count for all. `start`: where the training stage began.
    """

    distribution: Literal["lognormal_poisson", "poisson", "uniform", "fixed"]
    mean: int
    sigma: float
    max_loops: int
    seed: int
    curriculum_steps: int = 0
    sequences: BatchSchedule | None = None
    start: StageStart = FRESH

    @classmethod
    def of(cls, config: RunConfig, start: StageStart = FRESH) -> "DepthSampler":
        """The sampler of a training stage."""
        model, training = config.model, config.training
        return cls(
            training.depth_distribution,
            model.mean_recurrence,
            training.depth_sigma,
            model.max_loops,
            training.seed,
            training.depth_curriculum_steps,
            BatchSchedule.of(training) if training.depth_per == "sequence" else None,
            start,
        )

    def loops_at(self, step: int) -> int:
        """Loops that optimizer step `step` (from 0) runs: T, or the largest T of its sequences."""
        return max(self.depths_at(step)) if self.sequences is not None else self._draw(step, step, _STREAM)

    def depths_at(self, step: int) -> tuple[int, ...]:
        """T of each sequence of the global batch, in the order of the samples; empty where all have the same."""
        if self.sequences is None:
            return ()
        own = step - self.start.step
        first = self.start.sample + self.sequences.samples(own)
        samples = range(first, first + self.sequences.at(own))
        return tuple(self._draw(step, sample, _SEQUENCE_STREAM) for sample in samples)

    def _draw(self, step: int, number: int, stream: int) -> int:
        mean = growing_mean(step - self.start.step, self.mean, self.curriculum_steps, self.start.mean_recurrence)
        if self.distribution == "fixed":
            return round(mean)
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, number], np.uint64), counter=stream))
        if self.distribution == "uniform":
            drawn = int(generator.integers(1, round(2 * mean)))
        elif self.distribution == "poisson":
            drawn = int(generator.poisson(mean))
        else:
            rate = math.exp(generator.normal(math.log(mean) - self.sigma**2 / 2, self.sigma))
            drawn = int(generator.poisson(rate))
        return min(max(drawn, 1), self.max_loops)
