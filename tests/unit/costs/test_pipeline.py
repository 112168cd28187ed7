"""The schedule simulator: known bubbles, and counts and bytes by hand."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.costs import pipeline
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.costs.flops import flops_per_token
from mythos_ds.costs.pipeline import (
    VisitCost,
    Visits,
    predict,
    sent_bytes,
    simulate,
    visits_of,
)
from mythos_ds.costs.schedule import Action, backward, forward, interleaved_order, one_forward_one_backward_order
from mythos_ds.errors import ConfigError
from tests.helpers.mains import load_main

PERSISTENCE = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=null"]


def spread(layers: float, n_stages: int, n_loops: int, once: float) -> Visits:
    """A ring's visits: `layers` per loop and `once` before and after them, all spread evenly; backward 3 x forward."""
    costs = [once / n_stages, *[layers / n_stages] * n_loops, once / n_stages]
    return (tuple(VisitCost("loop", cost, 3 * cost) for cost in costs),) * n_stages


@pytest.mark.parametrize(
    ("layers", "n_stages", "n_micro_batches", "percent"),
    [(4, 2, 2, 1.5), (4, 4, 4, 2.2), (4, 2, 4, 0.7), (4, 4, 8, 1.1), (8, 8, 8, 1.3), (8, 8, 16, 0.7)],
)
def test_bubbles_of_the_ring(layers: int, n_stages: int, n_micro_batches: int, percent: float) -> None:
    """Against an independent simulation of 64 loops with 6 + 6 layers outside them."""
    simulation = simulate(interleaved_order(n_stages, 66, n_micro_batches), spread(layers, n_stages, 64, 6))
    assert round(100 * simulation.bubble(), 1) == percent


def test_bubbles_of_literal_stages() -> None:
    """60.5 % with equal stages; with 40, 432 and 40 processes each counts by its number."""
    order = one_forward_one_backward_order(3, 32)
    equal = simulate(order, tuple((VisitCost("loops", cost, 3 * cost),) for cost in (6, 64, 6)))
    assert round(100 * equal.bubble(), 1) == 60.5
    sizes = (40, 432, 40)
    scaled = [layers / size for layers, size in zip((6, 64, 6), sizes, strict=True)]
    for n_micro_batches, percent in ((8, 20.7), (32, 6.8)):
        order = one_forward_one_backward_order(3, n_micro_batches)
        uneven = simulate(order, tuple((VisitCost("loops", cost, 3 * cost),) for cost in scaled))
        assert round(100 * uneven.bubble(sizes), 1) == percent


def ring_bubble(n_stages: int, n_loops: int, n_micro_batches: int) -> float:
    """(P - 1) / (M (T + 2) + P - 1): the idle share of a ring whose visits all take equally long.

    Assumes M a multiple of P, prelude and coda visits as long as a loop's, gradient through every loop, and messages
    that take no time.
    """
    return (n_stages - 1) / (n_micro_batches * (n_loops + 2) + n_stages - 1)


@pytest.mark.parametrize(("n_stages", "n_loops", "n_micro_batches"), [(2, 1, 2), (3, 4, 6), (4, 16, 4), (8, 5, 24)])
def test_closed_form(n_stages: int, n_loops: int, n_micro_batches: int) -> None:
    """It holds for equal visits and whole rounds, whatever a backward costs."""
    order = interleaved_order(n_stages, n_loops + 2, n_micro_batches)
    for cost in (1.0, 2.0, 3.0):
        simulation = simulate(order, ((VisitCost("loop", 1.0, cost),) * (n_loops + 2),) * n_stages)
        assert simulation.bubble() == pytest.approx(ring_bubble(n_stages, n_loops, n_micro_batches))


def test_a_step_by_hand() -> None:
    """Two stages, one visit each, two micro-batches; messages that take half a unit."""
    order = one_forward_one_backward_order(2, 2)
    visits = ((VisitCost("prelude", 1, 2, sent_bytes=10),), (VisitCost("coda", 1, 2, received_bytes=10),))
    simulation = simulate(order, visits, message_time=0.5)
    times = [[(span.start, span.end) for span in spans] for spans in simulation.timeline]
    assert times == [[(0, 1), (1, 2), (5, 7), (8, 10)], [(1.5, 2.5), (2.5, 4.5), (4.5, 5.5), (5.5, 7.5)]]
    assert simulation.makespan == 10
    assert simulation.busy == (6, 6)
    assert simulation.idle == pytest.approx((0.4, 0.4))
    assert simulation.peak_held == (2, 1)
    assert simulation.peak_held_bytes == (0, 10)
    assert sent_bytes(visits, 2) == (20, 20)


def test_orders_that_wait_for_each_other() -> None:
    visits = ((VisitCost("prelude", 1, 2),), (VisitCost("coda", 1, 2),))
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(((backward(0, 0), forward(0, 0)), (forward(0, 0), backward(0, 0))), visits)


def run(pp_size: str, world_size: int, *overrides: str) -> ResolvedRun:
    """A run of `tiny` with 4 recurrent layers and 3 + 2 others."""
    settings = ["model.recurrent_layers=4", "model.prelude_layers=3", "model.coda_layers=2"]
    settings += [f"parallel.pp_size={pp_size}", *overrides]
    settings += PERSISTENCE
    return resolve(load_config("tiny.json", settings).config, world_size)


BATCH = ("training.micro_batch_size=2", "training.global_batch_size=16", "training.mean_backprop_depth=2")


@pytest.mark.parametrize("pp_size", ["2", "[1,2,1]"])
@pytest.mark.parametrize("checkpointing", ["none", "loop"])
def test_work_is_conserved(pp_size: str, checkpointing: str) -> None:
    """All stages together are busy for the FLOPs of the whole model, on all tokens of a step."""
    resolved = run(pp_size, 4, *BATCH, f"parallel.activation_checkpointing={checkpointing}")
    training, model = resolved.config.training, resolved.config.model
    prediction = predict(resolved, 5)
    expected = flops_per_token(
        model, context=training.seq_len, n_loops=5, n_grad_loops=2, recompute=checkpointing == "loop"
    )
    busy = sum(b * s.size for b, s in zip(prediction.simulation.busy, resolved.stages, strict=True))
    tokens = training.global_batch_size * training.seq_len
    assert busy == pytest.approx(tokens * (expected.training + expected.recompute))
    sizes = [stage.size for stage in resolved.stages]
    assert prediction.bubble == pytest.approx(1 - busy / (sum(sizes) * prediction.simulation.makespan))
    for spans, idle in zip(prediction.simulation.timeline, prediction.idle, strict=True):
        assert 0 <= idle < 1
        assert all(earlier.end <= later.start for earlier, later in pairwise(spans))


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_of_the_ring(dtype: str, width: int) -> None:
    """T = 5, of which 2 carry gradient; 2 stages, M = 4 micro-batches of 2 sequences per process."""
    resolved = run("2", 4, *BATCH, f"training.dtype={dtype}")
    assert resolved.gradient_accumulation_steps == 4
    values = 2 * 256 * 128
    prediction = predict(resolved, 5)
    # Stage 0 sends prelude, 5 loops and coda on; it sends gradients back to what stage 1 made of the prelude and of the
    # two loops with gradient.
    first = width + 5 * 4 + width + (width + 2 * 4)
    # Stage 1 sends prelude and 5 loops on, not its coda; gradients go back to each visit of stage 0 that has one.
    second = width + 5 * 4 + (width + 2 * 4 + width)
    assert prediction.sent_bytes == (4 * values * first, 4 * values * second)


def test_bytes_of_literal_stages() -> None:
    """The rows are cut by the sender: 4 on stages of one process, 2 on those of two."""
    resolved = run("[1,2,1]", 4, *BATCH, "training.dtype=bfloat16")
    assert [stage.rows for stage in resolved.stages] == [4, 2, 4]
    prediction = predict(resolved, 5)
    row = 256 * 128 * 2
    assert resolved.gradient_accumulation_steps == 4
    assert prediction.sent_bytes == (4 * 4 * row, 4 * 2 * (2 * row), 4 * 4 * row)
    assert prediction.peak_held == (3, 2, 1)
    assert prediction.peak_held_bytes == (0, 2 * 2 * row, 4 * row)


def test_visits_held_for_their_backward() -> None:
    """M = P = 2: the first stage holds a whole micro-batch more than the last, and only visits with gradient count."""
    resolved = run("2", 4, "training.micro_batch_size=1", "training.global_batch_size=4",
                   "training.mean_backprop_depth=2", "training.dtype=bfloat16")  # fmt: skip
    assert resolved.gradient_accumulation_steps == 2
    visits = visits_of(resolved, 5)
    assert [visit.has_gradient for visit in visits[0]] == [True, False, False, False, True, True, True]
    values = 256 * 128
    assert [visit.received_bytes // values for visit in visits[0]] == [0, 2, 4, 4, 4, 4, 4]
    assert [visit.received_bytes // values for visit in visits[1]] == [2, 4, 4, 4, 4, 4, 2]
    prediction = predict(resolved, 5)
    # Four visits with gradient per micro-batch. The last stage's second coda comes after the first one's backward.
    order = interleaved_order(2, 7, 2)
    for stage, own in enumerate(order):
        held: set[tuple[int, int]] = set()
        most = largest = 0
        for action in own:
            if visits[stage][action.visit].has_gradient:
                (held.discard if action.backward else held.add)((action.visit, action.micro_batch))
            most = max(most, len(held))
            largest = max(largest, sum(visits[stage][visit].received_bytes for visit, _ in held))
        assert (prediction.peak_held[stage], prediction.peak_held_bytes[stage]) == (most, largest)
    assert prediction.peak_held == (8, 7)
    assert prediction.peak_held_bytes == (2 * 3 * 4 * values, (2 * (2 + 2 * 4) + 2) * values)


def test_loops_without_gradient_take_a_forward_only() -> None:
    resolved = run("2", 4, *BATCH, "parallel.activation_checkpointing=none")
    visits = visits_of(resolved, 5)
    assert [visit.backward / visit.forward for visit in visits[1]] == [2, 0, 0, 0, 2, 2, 2]
    spans = predict(resolved, 5).simulation.timeline
    for own in spans:
        assert {span.action.visit for span in own if span.action.backward} == {0, 4, 5, 6}
        assert {span.action.visit for span in own if not span.action.backward} == set(range(7))
    # More loops with gradient than there are: all have it.
    assert all(visit.has_gradient for visit in visits_of(resolved, 2)[0])


def test_a_backward_without_gradient_waits_for_nothing() -> None:
    """Its message never comes; a wait for it would delay what follows on this stage."""
    without = VisitCost("loop", 1, 0, has_gradient=False)
    visits: Visits = ((VisitCost("prelude", 1, 2), without, VisitCost("coda", 1, 2)),) * 2
    order = interleaved_order(2, 3, 2)
    simulation = simulate(order, visits, message_time=10.0)
    ends = {(stage, span.action): span.end for stage, own in enumerate(simulation.timeline) for span in own}
    for stage in range(2):
        assert (stage, backward(1, 0)) not in ends
    # Forwards cross five hops.
    assert ends[1, forward(2, 0)] == 6 * 1 + 5 * 10
    # Backwards cross stage 1 -> 0 with the codas and, past the loop, stage 0 -> 1 and 1 -> 0 with the preludes.
    coda, prelude = backward(2, 1), backward(0, 0)
    assert ends[0, coda] == ends[1, coda] + 10 + 2
    assert ends[1, prelude] == ends[0, coda] + 10 + 2
    assert ends[0, prelude] == ends[1, prelude] + 10 + 2


def test_what_cannot_be_predicted() -> None:
    with pytest.raises(ValueError, match="no pipeline"):
        predict(run("1", 4, "training.micro_batch_size=2"), 4)
    with pytest.raises(ValueError, match="at least 1"):
        predict(run("2", 4, *BATCH), 0)


def test_the_simulation_looks_at_an_action_at_most_twice() -> None:
    """Else the planner, which simulates every layout it compares, would not end in time."""
    looks = 0

    class Counted(tuple[Action, ...]):
        def __getitem__(self, place: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().__getitem__(place)

    order = interleaved_order(8, 66, 16)
    simulate(tuple(map(Counted, order)), spread(8, 8, 64, 6))
    actions = sum(map(len, order))
    assert actions <= looks <= 2 * actions, looks / actions


@pytest.mark.parametrize(
    ("settings", "world_size", "batch"),
    [
        (["model.recurrent_layers=4", "parallel.pp_size=2"], 4, 2 * 2 * 80),
        (["model.recurrent_layers=4", "parallel.pp_size=4", "parallel.activation_checkpointing=none"], 4, 4 * 30),
        (["parallel.pp_size=[1,2,1]"], 4, 2 * 60),
    ],
)
def test_the_first_rounds_tell_of_very_many(
    settings: list[str], world_size: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is simulated of few rounds is what the whole simulation says."""
    settings = [*settings, "training.micro_batch_size=1", f"training.global_batch_size={batch}", *PERSISTENCE]
    resolved = resolve(load_config("tiny", settings).config, world_size)
    whole = pipeline.predict(resolved, 3)
    assert len(whole.simulation.timeline[0]) > 50
    monkeypatch.setattr(pipeline, "_EXACT_COMPUTATIONS", 10)
    few = pipeline.predict(resolved, 3)
    assert len(few.simulation.timeline[0]) < len(whole.simulation.timeline[0]) / 2
    assert few.idle == pytest.approx(whole.idle)
    assert few.bubble == pytest.approx(whole.bubble)
    assert (few.n_micro_batches, few.sent_bytes) == (whole.n_micro_batches, whole.sent_bytes)
    assert (few.peak_held, few.peak_held_bytes) == (whole.peak_held, whole.peak_held_bytes)


def test_stages_too_many_to_simulate_are_refused() -> None:
    settings = ["model.recurrent_layers=10000", "parallel.pp_size=10000", "training.micro_batch_size=1"]
    settings += ["training.global_batch_size=2000000000", *PERSISTENCE]
    resolved = resolve(load_config("tiny", settings).config, 10_000)
    with pytest.raises(ConfigError, match="more than are simulated; allowed: 5,000,000"):
        pipeline.predict(resolved, 4)
    assert "not simulated" in dry_run_report(resolved)


def load_tool():
    return load_main("tools/plot_pipeline.py")


def test_the_drawing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "ring.png"
    arguments = ["--config", "1t.json", "--loops", "6", "--out", str(image), "parallel.pp_size=2"]
    assert load_tool().main(arguments) == 0
    assert image.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "idle" in out
    assert "visits held" in out
    assert load_tool().main([*arguments[:-1], "parallel.pp_size=1"]) == 2
    assert "parallel.pp_size" in capsys.readouterr().err
