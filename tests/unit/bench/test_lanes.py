"""What two lanes hide on a simulated link, and that the order which plans play back is the one that runs."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mythos_ds.bench import lanes as bench
from mythos_ds.bench.lanes import Loops, OneRankMoE, SimulatedLink, loops_model, measure
from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.overlap import overlap
from mythos_ds.parallel.row_exchange import Passage
from mythos_ds.plan.activation_trace import Workload
from mythos_ds.plan.loop_order import Leave, Wait, recorded

LAYERS, ROWS, SEQ = 2, 4, 8
UNITS: list[ActivationCheckpointing] = ["none", "layer", "loop"]


def order_of_a_run(unit: ActivationCheckpointing, *, lanes: bool) -> list[tuple[str, int]]:
    """The events of a loop with its backward, of a model with numbers in it."""
    part = ModelChunk((), tuple(range(LAYERS)), (), embeds=False, loops=True, predicts=False)
    model = MythosModel(loops_model("1:1", 64), part=part, moe_factory=OneRankMoE, activation_checkpointing=unit)
    if lanes:
        overlap(model)
    context = model.make_context(torch.zeros(ROWS, SEQ, dtype=torch.int64), None, None, 1)
    x = torch.randn(ROWS, SEQ, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    events: list[tuple[str, int]] = []
    numbers: dict[int, int] = {}
    with SimulatedLink().attached():
        start, finish = Passage._start, Passage._finish

        def started(passage: Passage, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
            numbers[id(passage)] = len(events)
            events.append(("leave", rows.numel()))
            return start(passage, rows, there, here)

        def finished(passage: Passage) -> Tensor:
            events.append(("wait", sum(kind == "leave" for kind, _ in events[: numbers.pop(id(passage))])))
            return finish(passage)

        with patch.object(Passage, "_start", started), patch.object(Passage, "_finish", finished):
            model.recurrent.step(x, x, loop=0, context=context)[0].sum().backward()
    return events


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_the_order_that_plans_play_back_is_the_one_that_runs(unit: ActivationCheckpointing, lanes: bool) -> None:
    load = Workload(loops_model("1:1", 64), ROWS, SEQ, 1, 2, torch.float32, unit, on_gpu=False, overlap=lanes)
    planned = recorded(load, LAYERS, gradient=True)
    expected = [
        ("leave", event.bytes // 4) if isinstance(event, Leave) else ("wait", event.number)
        for event in planned
        if isinstance(event, (Leave, Wait))
    ]
    assert order_of_a_run(unit, lanes=lanes) == expected
    assert len(expected) >= 2 * 2 * 2 * LAYERS * (4 if lanes else 1)


def test_a_link_takes_time_for_bytes_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still while it computes: all that one exchange after the other takes, less nothing."""
    monkeypatch.setattr(bench, "SEQ", 8)
    monkeypatch.setattr(bench.time, "thread_time", lambda: 0.0)
    carried = set()
    for lanes in (False, True):
        loops = Loops("1:1", "loop", lanes=lanes, dim=64)
        free, slow = SimulatedLink(), SimulatedLink(0.5)
        assert (loops.run(free), free.waited) == (0.0, 0.0)
        loops.run(slow)
        assert slow.waited == 0.5 * slow.bytes
        carried |= {free.bytes, slow.bytes}
    assert len(carried) == 1


def test_a_measured_case_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SEQ", 16)
    monkeypatch.setattr(bench, "LAYERS", 1)
    monkeypatch.setattr(bench, "LOOPS", 2)
    for row in measure("24:76", "layer", 1):
        assert row["lanes_1"]["bytes"] == row["lanes_2"]["bytes"]
        assert 0.8 < row["experts_share_of_flops"] < 0.9
        assert row["two_lanes_to_one"] > 0
