"""The batch ramp is Megatron-LM's rule, as a pure function of the step."""

import random

import pytest

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import BatchRamp
from mythos_ds.errors import ConfigError

RAMP = 'training.global_batch_ramp={"start": %d, "increment": %d, "samples": %d}'


@pytest.mark.parametrize("seed", range(20))
def test_sizes_and_samples_are_those_of_a_loop_over_consumed_samples(seed):
    """RampupBatchsizeNumMicroBatchesCalculator of Megatron-LM, step by step."""
    pick = random.Random(seed)
    start, increment, increments, samples = (pick.randint(1, limit) for limit in (9, 8, 12, 400))
    size = start + increment * increments
    schedule = BatchSchedule(size, BatchRamp(start=start, increment=increment, samples=samples))
    consumed = 0
    for step in range(250):
        per_increment = samples / increments
        expected = size if consumed > samples else min(size, start + int(consumed / per_increment + 1e-9) * increment)
        assert (schedule.at(step), schedule.samples(step)) == (expected, consumed)
        assert (schedule.steps(consumed), schedule.steps(consumed + 1)) == (step, step + 1)
        consumed += expected


def test_without_a_ramp_it_is_one_size():
    schedule = BatchSchedule(8)
    assert (schedule.at(3), schedule.samples(3), schedule.steps(17), schedule.sizes()) == (8, 24, 3, [8])


def test_tokens_of_a_ramped_run_become_steps():
    config = ["training.max_tokens=5120", "training.warmup_steps=0", "training.micro_batch_size=1", RAMP % (2, 2, 12)]
    run = resolve(load_config("tiny", config).config, 1)
    # 2, 2, 4, 6, 8 sequences of 256: the fewest steps that have 20, which are 5,120 tokens
    assert (run.max_steps, run.total_samples, run.total_tokens) == (5, 22, 22 * 256)


@pytest.mark.parametrize(
    ("ramp", "processes", "message"),
    [
        ((8, 1, 9), 1, "start 8 given; allowed: less than global_batch_size = 8"),
        ((2, 4, 9), 1, "increment 4 given; allowed: divisors of global_batch_size - start = 6; nearest: 3 or 6"),
        ((1, 1, 9), 2, "start 1 given; allowed: multiples of micro_batch_size x processes = 2; nearest: 2"),
        ((2, 3, 9), 2, "increment 3 given; allowed: multiples of micro_batch_size x processes = 2; nearest: 2 or 6"),
    ],
)
def test_a_ramp_that_does_not_fit_is_told_with_the_nearest(ramp, processes, message):
    with pytest.raises(ConfigError) as caught:
        resolve(load_config("tiny", ["training.micro_batch_size=1", RAMP % ramp]).config, processes)
    assert caught.value.problems[0].endswith(f"training.global_batch_ramp: {message}")


def test_a_pipeline_takes_whole_rounds_at_every_size():
    ring = ["parallel.pp_size=2", "model.recurrent_layers=2", "training.micro_batch_size=1", "parallel.zero_stage=3"]
    ring += ["deepspeed.zero_optimization.stage3_param_persistence_threshold=null"]
    assert resolve(load_config("tiny", [*ring, RAMP % (2, 2, 9)]).config, 2).total_samples > 0
    with pytest.raises(
        ConfigError, match=r"global_batch_ramp: its batch of 1 given; allowed: at least 2 micro-batches"
    ):
        resolve(load_config("tiny", [*ring, RAMP % (1, 1, 9)]).config, 2)
