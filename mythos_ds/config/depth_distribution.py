"""The distribution of the loop count T in training, as probabilities: to check and to plan a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_NODES = 241
_WIDTH = 6.0
_BY_LOOPS = 128


@dataclass(frozen=True)
class StageStart:
    """Where a training stage began: optimizer steps and sequences of the run before it, and the mean loop count that a
    curriculum grows from."""

    step: int = 0
    sample: int = 0
    mean_recurrence: int = 1


FRESH = StageStart()
"""Where a run begins."""


def depth_pmf(distribution: str, mean: float, sigma: float, max_loops: int) -> tuple[float, ...]:
    """Probabilities of T = 1 .. max_loops; entry i is P(T = i + 1).

    lognormal_poisson: T = clip(Poisson(r), 1, max_loops), log r ~ N(log mean - sigma^2/2, sigma) (the one of
    Geiping et al. 2025, arXiv 2502.05171, unshifted); poisson: r = mean; uniform: on 1 .. 2 mean - 1, rounded; fixed:
    mean, rounded.
    """
    if distribution == "fixed":
        raw = {round(mean): 1.0}
    elif distribution == "uniform":
        end = round(2 * mean)
        raw = {loops: 1.0 / (end - 1) for loops in range(1, end)}
    elif distribution == "poisson":
        raw = _poisson_mixture([(mean, 1.0)], max_loops)
    elif distribution == "lognormal_poisson":
        raw = _poisson_mixture(_lognormal_rates(mean, sigma), max_loops)
    else:
        raise ValueError(f"unknown depth distribution {distribution!r}")
    return _clipped(raw, max_loops)


def growing_mean(step: int, mean: int, curriculum_steps: int, first: int = 1) -> float:
    """The distribution's mean at optimizer step `step` (from 0): from `first` linearly to `mean` at step
    `curriculum_steps`, then held (retrofitted recurrence, arXiv 2511.07384)."""
    return mean if step >= curriculum_steps else float(first) + (mean - first) * step / curriculum_steps


def largest_of(pmf: Sequence[float], draws: int) -> tuple[float, ...]:
    """Probabilities of the largest of `draws` independent loop counts."""
    below = [min(total, 1.0) ** draws for total in accumulate(pmf)]
    return tuple(after - before for before, after in zip([0.0, *below], below, strict=False))


def mean_depth(pmf: Sequence[float]) -> float:
    """Expected loop count."""
    return sum((index + 1) * probability for index, probability in enumerate(pmf))


def evaluation_depths(mean: int, *, deep: bool) -> list[int]:
    """The loop counts 1, T/2, T and 2T that an evaluation runs, T = mean, and 4T and 8T of a deep one; each once,
    ascending."""
    return sorted({1, max(1, mean // 2), mean, 2 * mean, *((4 * mean, 8 * mean) if deep else ())})


def deep_shares(pmf: Sequence[float]) -> list[float]:
    """P(T > n / 2) for each n = 1 .. max_loops, if n were max_loops: what lies beyond n would be drawn as n."""
    above = [*accumulate(reversed(pmf))][::-1]  # above[i] = P(T > i)
    return [above[(loops // 2)] for loops in range(1, len(pmf) + 1)]


def _lognormal_rates(mean: float, sigma: float) -> list[tuple[float, float]]:
    """Rates and weights that integrate over the log-normal by the trapezoidal rule."""
    step = 2 * _WIDTH / (_NODES - 1)
    points = [-_WIDTH + index * step for index in range(_NODES)]
    total = sum(math.exp(-z * z / 2) for z in points)
    return [(mean * math.exp(sigma * z - sigma * sigma / 2), math.exp(-z * z / 2) / total) for z in points]


def _poisson_mixture(rates: list[tuple[float, float]], max_loops: int) -> dict[int, float]:
    """P(T = t) for t < max_loops; the rest of the mass lies at max_loops."""
    if max_loops > _BY_LOOPS:
        return _large_poisson_mixture(rates, max_loops)
    raw = dict.fromkeys(range(max_loops), 0.0)
    for rate, weight in rates:
        for count in range(max_loops):
            raw[count] += weight * math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))
    raw[max_loops] = max(0.0, 1.0 - sum(raw.values()))
    return raw


def _large_poisson_mixture(rates: list[tuple[float, float]], max_loops: int) -> dict[int, float]:
    """The same at once for all counts: thousands of loops, for each mean of a curriculum, would take a minute."""
    import numpy as np  # a dry run of fewer loops does without

    counts = np.arange(max_loops, dtype=np.float64)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    rate = np.array([rate for rate, _ in rates])[:, None]
    weights = np.array([weight for _, weight in rates])
    likely = weights @ np.exp(counts * np.log(rate) - rate - log_factorials)
    raw = dict(enumerate(likely.tolist()))
    raw[max_loops] = max(0.0, 1.0 - float(likely.sum()))
    return raw


def _clipped(raw: dict[int, float], max_loops: int) -> tuple[float, ...]:
    pmf = [0.0] * max_loops
    for loops, probability in raw.items():
        pmf[min(max(loops, 1), max_loops) - 1] += probability
    return tuple(pmf)
