"""Loop counts in training are a function of (seed, step) and follow the law that the planner uses."""

import numpy as np
import pytest
import torch

from mythos_ds.config.depth import depth_pmf, mean_depth
from mythos_ds.model.depth import DepthSampler

LAWS = ["lognormal_poisson", "poisson", "uniform", "fixed"]
DRAWS = 20_000


def draws(law: str, mean: int, max_loops: int, sigma: float = 0.5, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    sampler = DepthSampler(law, mean, sigma, max_loops, seed)  # type: ignore[arg-type]
    return np.array([sampler.loops_at(step) for step in range(count)])


@pytest.mark.parametrize("law", LAWS)
def test_a_function_of_seed_and_step_alone(law: str) -> None:
    sampler = DepthSampler(law, 8, 0.5, 16, 11)  # type: ignore[arg-type]
    forward = [sampler.loops_at(step) for step in range(200)]
    np.random.seed(5)  # noqa: NPY002 - global generators must not matter
    torch.manual_seed(5)
    backward = [DepthSampler(law, 8, 0.5, 16, 11).loops_at(step) for step in reversed(range(200))]  # type: ignore[arg-type]
    assert forward == backward[::-1]
    if law != "fixed":
        assert forward != [DepthSampler(law, 8, 0.5, 16, 12).loops_at(step) for step in range(200)]  # type: ignore[arg-type]
    assert all(type(loops) is int for loops in forward)


def test_the_sequence_is_pinned() -> None:
    """A changed sequence would break the resumption of a run."""
    sampler = DepthSampler("lognormal_poisson", 8, 0.5, 16, 0)
    assert [sampler.loops_at(step) for step in (0, 1, 2, 3, 1000, 10**6)] == [5, 12, 12, 13, 16, 3]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("mean", "max_loops"), [(4, 16), (8, 16), (12, 12), (1, 4)])
def test_agrees_with_the_planned_law(law: str, mean: int, max_loops: int) -> None:
    loops = draws(law, mean, max_loops)
    assert loops.min() >= 1
    assert loops.max() <= max_loops
    pmf = np.array(depth_pmf(law, mean, 0.5, max_loops))
    assert pmf.sum() == pytest.approx(1.0)
    share = np.bincount(loops, minlength=max_loops + 1)[1:] / DRAWS
    # Five standard deviations of a binomial share.
    assert (np.abs(share - pmf) <= 5 * np.sqrt(pmf * (1 - pmf) / DRAWS) + 1e-3).all()
    assert loops.mean() == pytest.approx(mean_depth(pmf), abs=5 * loops.std() / DRAWS**0.5 + 1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_the_mean_is_the_one_asked_for(law: str) -> None:
    assert draws(law, 8, 1000).mean() == pytest.approx(8, rel=0.02)


def test_steps_are_independent() -> None:
    loops = draws("lognormal_poisson", 8, 1000).astype(float)
    assert abs(np.corrcoef(loops[:-1], loops[1:])[0, 1]) < 0.03
    other = draws("lognormal_poisson", 8, 1000, seed=1).astype(float)
    assert abs(np.corrcoef(loops, other)[0, 1]) < 0.03


def test_large_seeds_and_steps() -> None:
    assert 1 <= DepthSampler("poisson", 4, 0.5, 16, 2**63 - 1).loops_at(2**40) <= 16
