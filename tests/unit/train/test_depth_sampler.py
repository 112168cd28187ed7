"""Loop counts in training are a function of (seed, step) and follow the distribution that the planner uses."""

import numpy as np
import pytest
import torch

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.depth_distribution import StageStart, depth_pmf, growing_mean, largest_of, mean_depth
from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import BatchRamp
from mythos_ds.costs.flops import expected_flops_per_token, mean_training_depth
from mythos_ds.train.depth_sampler import DepthSampler

DISTRIBUTIONS = ["lognormal_poisson", "poisson", "uniform", "fixed"]
DRAWS = 20_000


def draws(
    distribution: str, mean: int, max_loops: int, sigma: float = 0.5, count: int = DRAWS, seed: int = 0
) -> np.ndarray:
    sampler = DepthSampler(distribution, mean, sigma, max_loops, seed)  # type: ignore[arg-type]
    return np.array([sampler.loops_at(step) for step in range(count)])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_function_of_seed_and_step_alone(distribution: str) -> None:
    sampler = DepthSampler(distribution, 8, 0.5, 16, 11)  # type: ignore[arg-type]
    forward = [sampler.loops_at(step) for step in range(200)]
    np.random.seed(5)  # noqa: NPY002 - global generators must not matter
    torch.manual_seed(5)
    backward = [DepthSampler(distribution, 8, 0.5, 16, 11).loops_at(step) for step in reversed(range(200))]  # type: ignore[arg-type]
    assert forward == backward[::-1]
    if distribution != "fixed":
        assert forward != [DepthSampler(distribution, 8, 0.5, 16, 12).loops_at(step) for step in range(200)]  # type: ignore[arg-type]
    assert all(type(loops) is int for loops in forward)


def test_the_sequence_is_pinned() -> None:
    """A changed sequence would break the resumption of a run."""
    sampler = DepthSampler("lognormal_poisson", 8, 0.5, 16, 0)
    assert [sampler.loops_at(step) for step in (0, 1, 2, 3, 1000, 10**6)] == [5, 12, 12, 13, 16, 3]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("mean", "max_loops"), [(4, 16), (8, 16), (12, 12), (1, 4)])
def test_draws_the_planned_distribution(distribution: str, mean: int, max_loops: int) -> None:
    loops = draws(distribution, mean, max_loops)
    assert loops.min() >= 1
    assert loops.max() <= max_loops
    pmf = np.array(depth_pmf(distribution, mean, 0.5, max_loops))
    assert pmf.sum() == pytest.approx(1.0)
    share = np.bincount(loops, minlength=max_loops + 1)[1:] / DRAWS
    # Five standard deviations of a binomial share.
    assert (np.abs(share - pmf) <= 5 * np.sqrt(pmf * (1 - pmf) / DRAWS) + 1e-3).all()
    assert loops.mean() == pytest.approx(mean_depth(pmf.tolist()), abs=5 * loops.std() / DRAWS**0.5 + 1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_is_the_one_asked_for(distribution: str) -> None:
    assert draws(distribution, 8, 1000).mean() == pytest.approx(8, rel=0.02)


def test_steps_are_independent() -> None:
    loops = draws("lognormal_poisson", 8, 1000).astype(float)
    assert abs(np.corrcoef(loops[:-1], loops[1:])[0, 1]) < 0.03
    other = draws("lognormal_poisson", 8, 1000, seed=1).astype(float)
    assert abs(np.corrcoef(loops, other)[0, 1]) < 0.03


def test_large_seeds_and_steps() -> None:
    assert 1 <= DepthSampler("poisson", 4, 0.5, 16, 2**63 - 1).loops_at(2**40) <= 16


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_grows_to_that_of_the_rest(distribution: str) -> None:
    plain, growing = (DepthSampler(distribution, 8, 0.5, 100, 3, steps) for steps in (0, 1000))  # type: ignore[arg-type]
    rest = range(1000, 1100)
    assert [growing.loops_at(step) for step in rest] == [plain.loops_at(step) for step in rest]
    assert growing.loops_at(0) <= 4
    drawn = np.array([growing.loops_at(step) for step in range(1000)])
    assert drawn[:500].mean() == pytest.approx(2.75, abs=0.4)  # a count below 1 is drawn as 1
    assert drawn[500:].mean() == pytest.approx(6.25, abs=0.4)
    assert [growing_mean(step, 8, 1000) for step in (0, 500, 1000, 2000)] == [1, 4.5, 8, 8]
    assert [growing_mean(step, 8, 1000, 4) for step in (0, 500, 1000)] == [4, 6, 8]


def test_each_sequence_draws_its_own_from_the_distribution() -> None:
    sampler = DepthSampler("poisson", 4, 0.5, 16, 5, 0, BatchSchedule(64))
    drawn = [sampler.depths_at(step) for step in range(300)]
    assert [sampler.loops_at(step) for step in range(300)] == [max(depths) for depths in drawn]
    # By the number of the sample, not by the batch: a batch twice as large has the same ones.
    twice = DepthSampler("poisson", 4, 0.5, 16, 5, 0, BatchSchedule(128))
    assert twice.depths_at(7) == drawn[14] + drawn[15]
    # In a later stage and on a ramp they go on by the number of the sample, too.
    ramp = BatchSchedule(128, BatchRamp(start=64, increment=64, samples=128))
    later = DepthSampler("poisson", 4, 0.5, 16, 5, 0, ramp, StageStart(step=7, sample=7 * 64))
    assert [later.depths_at(step) for step in (7, 8, 9)] == [drawn[7], drawn[8], drawn[9] + drawn[10]]
    pmf = depth_pmf("poisson", 4, 0.5, 16)
    share = np.bincount(np.array(drawn).ravel(), minlength=17)[1:] / (300 * 64)
    assert np.abs(share - pmf).max() < 0.015
    largest = np.array([max(depths) for depths in drawn])
    assert largest.mean() == pytest.approx(mean_depth(largest_of(pmf, 64)), abs=0.3)
    per_step = DepthSampler("poisson", 4, 0.5, 16, 5)
    assert per_step.depths_at(0) == ()
    assert [per_step.loops_at(step) for step in range(64)] != list(drawn[0])


@pytest.mark.parametrize("distribution", ["lognormal_poisson", "poisson"])
@pytest.mark.parametrize("per", ["step", "sequence"])
@pytest.mark.parametrize("curriculum", [0, 60])
def test_the_plan_counts_the_loops_that_steps_run(distribution: str, per: str, curriculum: int) -> None:
    changes = [f"training.depth_distribution={distribution}", f"training.depth_per={per}", "training.max_steps=100"]
    changes += [f"training.depth_curriculum_steps={curriculum}", "model.max_loops=12", "training.warmup_steps=0"]
    config = load_config("tiny", changes).config
    runs = [
        DepthSampler.of(config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})}))
        for seed in range(30)
    ]
    loops = [sampler.loops_at(step) for sampler in runs for step in range(100)]
    assert mean_training_depth(config) == pytest.approx(np.mean(loops), rel=0.04)


def test_the_planned_flops_of_one_distribution_for_all_steps_are_as_they_were() -> None:
    config = load_config("tiny", []).config
    grown = load_config("tiny", ["training.depth_curriculum_steps=300"]).config
    assert expected_flops_per_token(grown, 2).training < expected_flops_per_token(config, 2).training
    model, training = config.model, config.training
    pmf = depth_pmf(training.depth_distribution, model.mean_recurrence, training.depth_sigma, model.max_loops)
    assert mean_training_depth(config) == mean_depth(pmf)
