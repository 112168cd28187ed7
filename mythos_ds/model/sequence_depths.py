"""How many loops a training step runs: a function of (seed, optimizer step) only, or one count per sequence, a function
of (seed, sample number) and of the step as far as the law's mean still grows.

All micro-batches, ranks and layouts of a step get the same counts without communication, and a resumed run goes on with
the same sequence.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from mythos_ds.config.depth_distribution import growing_mean
from mythos_ds.config.schema import RunConfig

_STREAM = 0x6D797468
_SEQUENCE_STREAM = _STREAM << 64


@dataclass(frozen=True)
class DepthSampler:
    """The loop counts of a run, in [1, max_loops].

    lognormal_poisson: Poisson(exp(tau)), tau ~ N(log mean - sigma^2/2, sigma) (Geiping et al. 2025, without their
    offset); poisson: Poisson(mean); uniform: 1 .. 2 mean - 1; fixed: mean. All but fixed are clipped. The mean grows
    over the first `curriculum_steps` (see `growing_mean`). `sequences`: how many sequences of a step draw a count of
    their own (Parcae, arXiv 2604.12946); 0 = one count for all.
    """

    distribution: Literal["lognormal_poisson", "poisson", "uniform", "fixed"]
    mean: int
    sigma: float
    max_loops: int
    seed: int
    curriculum_steps: int = 0
    sequences: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> "DepthSampler":
        """The sampler of a run."""
        model, training = config.model, config.training
        return cls(
            training.depth_distribution,
            model.mean_recurrence,
            training.depth_sigma,
            model.max_loops,
            training.seed,
            training.depth_curriculum_steps,
            training.global_batch_size if training.depth_per == "sequence" else 0,
        )

    def loops_at(self, step: int) -> int:
        """Loops that optimizer step `step` (from 0) runs: T, or the largest T of its sequences."""
        return max(self.depths_at(step)) if self.sequences else self._draw(step, step, _STREAM)

    def depths_at(self, step: int) -> tuple[int, ...]:
        """T of each sequence of the global batch, in the order of the samples; empty where all have the same."""
        samples = range(step * self.sequences, (step + 1) * self.sequences)
        return tuple(self._draw(step, sample, _SEQUENCE_STREAM) for sample in samples)

    def _draw(self, step: int, number: int, stream: int) -> int:
        mean = growing_mean(step, self.mean, self.curriculum_steps)
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


@dataclass(frozen=True)
class SequenceDepths:
    """The depths of sequences that run n_loops loops together, each a number of its own (Parcae, arXiv 2604.12946).

    All sequences end in the same loop, so that one coda reads them all: sequence i begins in loop n_loops - depths[i].
    Before that its state stays h_0, and what the block computes for it is not used and not counted. From then on it
    sees its own loop index, from 0, so that its result is the one it would have alone.
    """

    depths: Tensor
    """int64 [batch], 1 .. n_loops."""
    n_loops: int

    def index(self, loop: int) -> Tensor:
        """Computes each sequence's own loop index in loop `loop`, int64 [batch]; 0 before it begins."""
        return (self.depths + (loop - self.n_loops)).clamp_min(0)

    def begun(self, loop: int) -> Tensor:
        """Says which sequences run in loop `loop`, bool [batch]."""
        return self.depths >= self.n_loops - loop

    def loss_weights(self, loop: int, n_grad_loops: int) -> Tensor:
        """Computes the weights of the sequences' auxiliary losses in loop `loop`, fp32 [batch], so that the mean over
        the last n_grad_loops loops is one over the loops with gradient that a sequence runs."""
        return self.begun(loop) * (n_grad_loops / self.depths.clamp_max(n_grad_loops))
