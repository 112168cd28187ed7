"""How many loops a training step runs: a function of (seed, optimizer step) only.

All micro-batches, ranks and layouts of a step get the same count without communication, and a resumed run goes on with
the same sequence.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

_STREAM = 0x6D797468


@dataclass(frozen=True)
class DepthSampler:
    """Loop counts in [1, max_loops].

    lognormal_poisson: Poisson(exp(tau)), tau ~ N(log mean - sigma^2/2, sigma) (Geiping et al. 2025, without their
    offset); poisson: Poisson(mean); uniform: 1 .. 2 mean - 1; fixed: mean. All but fixed are clipped.
    """

    distribution: Literal["lognormal_poisson", "poisson", "uniform", "fixed"]
    mean: int
    sigma: float
    max_loops: int
    seed: int

    def loops_at(self, step: int) -> int:
        """Loop count T of optimizer step `step` (from 0)."""
        if self.distribution == "fixed":
            return self.mean
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64), counter=_STREAM))
        if self.distribution == "uniform":
            drawn = int(generator.integers(1, 2 * self.mean))
        elif self.distribution == "poisson":
            drawn = int(generator.poisson(self.mean))
        else:
            rate = math.exp(generator.normal(math.log(self.mean) - self.sigma**2 / 2, self.sigma))
            drawn = int(generator.poisson(rate))
        return min(max(drawn, 1), self.max_loops)
