"""Waits for rows: an order of events played back, and the order that is recorded from the model."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.costs.flops import flops_per_token
from mythos_ds.hardware import Gpu, read_gpu
from mythos_ds.plan.activation_trace import Workload, sample, trace
from mythos_ds.plan.exchange import HopLinks, exchanged
from mythos_ds.plan.layouts import candidates, ranked
from mythos_ds.plan.loop_order import SAMPLE_TOKENS, Event, Leave, Wait, Work, recorded, works
from mythos_ds.plan.memory import memory, workload
from mythos_ds.plan.slots import Pace, play, row_waits
from mythos_ds.plan.timing import least_seconds, timing
from tests.helpers.toy_model import toy_model

GPU = replace(
    read_gpu("h200"), peak_flops=1.0, kernel_share=1.0, memory_bandwidth=1.0, memory_share=1.0, launch_s=0.0,
    node_bandwidth=1.0, network_bandwidth=1.0,
)  # fmt: skip
"""A second for each FLOP and byte."""
ACROSS, INSIDE = HopLinks(1, 1, 1.0), HopLinks(2, 0, 1.0)
"""Half of the bytes go to the other rank."""


def busy(seconds: float) -> Event:
    return Work(other_flops=seconds)


ORDERS: list[tuple[list[Event], float]] = [
    ([busy(3), Leave(0, 0, 8), Wait(0), busy(1)], 8),  # nothing to do meanwhile
    ([busy(3), Leave(0, 0, 8), busy(3), Wait(0), busy(1)], 8),
    ([busy(3), Leave(0, 0, 8), busy(5), Wait(0), busy(1)], 9),  # all hidden
    ([Leave(0, 0, 8), Leave(1, 0, 4), Wait(0), busy(1), Wait(1)], 6),  # one link
    ([Leave(0, 0, 8), Leave(1, 1, 4), Wait(1), busy(1), Wait(0)], 4),  # two
    ([Leave(0, 0, 8)], 0),  # nobody waits
]


@pytest.mark.parametrize(("events", "total"), ORDERS)
def test_an_order_played_back(events: Sequence[Event], total: float) -> None:
    played = play(events, Pace(GPU), [ACROSS, INSIDE])
    assert played.total == total
    assert played.busy == sum(event.other_flops for event in events if isinstance(event, Work))


def test_work_lasts_as_long_as_its_products_and_bytes_or_its_launches() -> None:
    work = Work(expert_flops=4.0, other_flops=1.0, attention_rows=0.5, bytes=3.0, launches=5)
    pace = Pace(GPU, attention_row_flops=2.0, times=2.0)
    assert pace.seconds(work) == 18
    assert pace.seconds(work, 1.5) == 22
    assert replace(pace, gpu=replace(GPU, launch_s=10.0)).seconds(work) == 50
    events: list[Event] = [work, Leave(0, 0, 8), Wait(0)]
    assert play(events, replace(pace, times=1.0), [ACROSS], hottest=1.5).total == 4 * 1.5 + 2 + 3 + 4 * 1.5


FREE = ("model.n_expert_groups=null", "model.n_limited_groups=null", "parallel.dispatch=all_to_all")


def run(*overrides: str) -> ResolvedRun:
    return resolve(load_config("1t", [*FREE, *overrides]).config, 1024)


def events_of(resolved: ResolvedRun, layers: int, *, gradient: bool) -> tuple[Event, ...]:
    return recorded(sample(workload(resolved), SAMPLE_TOKENS), layers, gradient=gradient)


LAYOUTS = [
    ("all_to_all", "false", "layer"), ("per_rank", "true", "layer"), ("per_node", "true", "loop"),
    ("per_node", "false", "none"), ("all_to_all", "true", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("dispatch", "lanes", "unit"), LAYOUTS)
def test_what_is_recorded_is_what_formulas_say(dispatch: str, lanes: str, unit: str) -> None:
    """FLOPs of products, and bytes that leave; every exchange is waited for but those that a recompute ends before."""
    settings = (
        f"parallel.dispatch={dispatch}",
        f"parallel.overlap={lanes}",
        f"parallel.activation_checkpointing={unit}",
    )
    resolved = run(*settings, "model.recurrent_layers=2", "model.lora_rank=0")
    model, training = resolved.config.model, resolved.config.training
    once, twice = (flops_per_token(model, context=training.seq_len, n_loops=n) for n in (1, 2))
    loop = twice.forward + twice.attention - once.forward - once.attention
    tokens = resolved.stages[0].rows * training.seq_len * resolved.gradient_accumulation_steps
    for gradient in (False, True):
        events = events_of(resolved, 2, gradient=gradient)
        pace = replace(Pace.of(GPU, workload(resolved)), times=1.0)
        flops = sum(pace.seconds(replace(work, bytes=0.0, launches=0)) for work in works(events))
        times = 1 if not gradient else 3 if unit == "none" else 4
        # Groups of rows are padded to 8; a recompute ends before what no backward needs: the last products.
        assert flops / SAMPLE_TOKENS == pytest.approx(times * loop, rel=0.01 if times < 4 else 0.05)
        left = sum(event.bytes for event in events if isinstance(event, Leave))
        expected = exchanged(resolved, 1, float(gradient), ranks_per_node=8).total / tokens * SAMPLE_TOKENS
        assert left == pytest.approx(expected, rel=0.01)
        numbers = [[e.number for e in events if isinstance(e, kind)] for kind in (Leave, Wait)]
        assert len(set(numbers[0])) == len(numbers[0])
        assert set(numbers[1]) <= set(numbers[0])
        if unit == "none" or not gradient:
            assert sorted(numbers[1]) == sorted(numbers[0])


def waits(resolved: ResolvedRun, gpu: Gpu) -> float:
    return row_waits(resolved, 16, 8, gpu, 0).even


def test_lanes_hide_most_of_what_one_lane_waits_for() -> None:
    gpu = read_gpu("h200")
    one, two = (
        timing(run("parallel.dispatch=per_node", f"parallel.overlap={lanes}"), gpu) for lanes in ("false", "true")
    )
    exchange = next(t.seconds for t in one.transfers if t.name == "dispatch and combine")
    assert 0.85 * exchange < one.waits_s < exchange, "shared experts hide the rest"
    assert two.waits_s < 0.5 * one.waits_s
    assert two.built_s < 0.85 * one.built_s
    assert two.hottest_s is not None
    assert 1 < two.hottest_s / two.built_s < 1.2
    assert two.bound_s <= two.built_s


def test_links_without_limit_make_nobody_wait() -> None:
    gpu = replace(read_gpu("h200"), node_bandwidth=1e30, network_bandwidth=1e30)
    assert waits(run("parallel.overlap=true"), gpu) == pytest.approx(0, abs=1e-9)
    alone = resolve(load_config("tiny", ["parallel.ep_size=1"]).config, 1)
    assert row_waits(alone, 4, 2, read_gpu("h200"), 0).even == 0


def test_the_hottest_rank_is_known_where_experts_are_told_apart() -> None:
    gpu = read_gpu("h200")
    whole = run("training.dtype=float32", "training.grad_dtype=float32")
    assert row_waits(whole, 2, 1, gpu, 0).hottest is None
    assert timing(whole, gpu).mfu_hottest is None


def test_layouts_come_by_their_times_and_the_least_is_never_more() -> None:
    config, gpu = load_config("tiny", []).config, replace(read_gpu("h200"), gpus_per_node=2)
    found = ranked([config], 4, gpu, "time", most=3)
    times = [layout.timing.built_s / layout.timing.tokens_per_step for (layout,) in found]
    assert times == sorted(times)
    looked_at = list(candidates(config, 4, gpu))
    assert {c["parallel.dispatch"] for c in looked_at} == {"all_to_all", "per_rank", "per_node"}
    assert {(c["parallel.ep_size"] > 1, c["parallel.overlap"]) for c in looked_at} == {
        (True, True), (True, False), (False, False),
    }  # fmt: skip
    for (layout,) in found:
        assert least_seconds(layout.resolved, gpu) <= layout.timing.built_s * (1 + 1e-9)
        assert memory(layout.resolved).total == layout.memory.total


@pytest.mark.parametrize("dispatch", ["all_to_all", "per_rank", "per_node"])
@pytest.mark.parametrize("unit", ["none", "layer", "loop"])
def test_lanes_hold_hardly_more_and_leave_nothing_behind(dispatch: str, unit: ActivationCheckpointing) -> None:
    """Also of exchanges that a recompute starts and nobody waits for, without Python's collector."""
    load = Workload(toy_model(), 4, 64, 4, 4, torch.bfloat16, unit, dispatch=dispatch, ranks_per_node=2)
    gc.collect()
    gc.disable()
    try:
        one, two = (trace(replace(load, overlap=lanes)).peak for lanes in (False, True))
    finally:
        gc.enable()
    assert two <= 1.15 * one
