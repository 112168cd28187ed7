"""Learning-rate schedules are pure functions of the step and the planned lengths."""

from itertools import pairwise

import pytest

from mythos_ds.config.schema import TrainingConfig
from mythos_ds.train.lr_schedule import PlannedLength, learning_rate, schedule_factor


def training(**values):
    settings = {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 1, "lr": 0.5, "warmup_steps": 10}
    return TrainingConfig(**{**settings, **values})


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    config = training(schedule=schedule)
    assert [schedule_factor(step, 100, config) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]


def test_wsd_is_constant_then_falls_to_the_floor():
    config = training(schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    factors = [schedule_factor(step, 100, config) for step in range(100)]
    assert factors[10:80] == [1.0] * 70
    assert all(left > right for left, right in pairwise(factors[79:]))
    assert factors[99] == pytest.approx(0.1)


def test_cosine_falls_to_the_floor_and_is_half_way_in_the_middle():
    config = training(schedule="cosine", min_lr_ratio=0.0)
    assert schedule_factor(54, 100, config) == pytest.approx(0.5)
    assert schedule_factor(99, 100, config) == pytest.approx(0.0)


def test_constant_stays():
    assert schedule_factor(99, 100, training(schedule="constant")) == 1.0


def test_no_warm_up_starts_at_the_peak():
    assert schedule_factor(0, 100, training(warmup_steps=0)) == 1.0


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_runs_of_a_few_steps_stay_within_bounds(schedule):
    for total in (1, 2, 3):
        config = training(schedule=schedule, warmup_steps=0)
        assert all(0.0 < schedule_factor(step, total, config) <= 1.0 for step in range(total))


def test_rate_is_factor_times_peak():
    config = training()
    rate = learning_rate(95, config, [PlannedLength(0, 100)])
    assert rate == 0.5 * schedule_factor(95, 100, config)


def test_extension_before_the_decay_of_wsd_changes_nothing():
    config = training(schedule="wsd")
    lengths = [PlannedLength(0, 100), PlannedLength(50, 200)]
    plain = [learning_rate(step, config, [PlannedLength(0, 200)]) for step in range(200)]
    assert [learning_rate(step, config, lengths) for step in range(200)] == pytest.approx(plain)


def test_extension_of_a_finished_run_warms_up_from_where_it_ended():
    config = training(schedule="wsd", min_lr_ratio=0.02)
    lengths = [PlannedLength(0, 100), PlannedLength(100, 200)]
    rates = [learning_rate(step, config, lengths) for step in range(200)]
    assert rates[:100] == [learning_rate(step, config, lengths[:1]) for step in range(100)]
    assert rates[99] == pytest.approx(0.01)
    steps = [right - left for left, right in pairwise(rates[99:110])]
    assert steps == pytest.approx([0.049] * 10)
    assert rates[110:160] == [0.5] * 50
    assert rates[199] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_a_stage_warms_up_from_the_rate_before_it(schedule):
    """Over its own length: after the warm-up it is the schedule of a run of that length."""
    config, lengths = training(schedule=schedule), [PlannedLength(0, 100)]
    rates = [learning_rate(step, config, lengths, start_lr=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 + 0.4 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == [learning_rate(step, config, lengths) for step in range(10, 100)]
    plain = training(schedule=schedule, warmup_steps=0)
    assert learning_rate(0, plain, lengths, start_lr=0.1) == learning_rate(0, plain, lengths)


def test_a_stage_that_is_extended_in_its_warm_up_goes_on_from_there():
    config = training(schedule="constant")
    lengths = [PlannedLength(0, 8), PlannedLength(8, 40)]
    stood = learning_rate(7, config, lengths, start_lr=0.1)
    assert stood == pytest.approx(0.1 + 0.4 * 0.8)
    assert stood < learning_rate(8, config, lengths, start_lr=0.1) < 0.5
    assert learning_rate(39, config, lengths, start_lr=0.1) == 0.5
