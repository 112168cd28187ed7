"""Two lanes give what the whole micro-batch gives, and each goes on where the other's rows are under way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.dispatch import Journey, LocalDispatcher
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.overlap import CHUNKS, interleave, overlap
from mythos_ds.parallel.routing_stats import StepRecords
from tests.helpers.perturbed_recompute import perturbed_recompute
from tests.helpers.toy_model import MLA, randomise, toy_batch, toy_config

LOOPS, GRAD_LOOPS = 5, 3
Found = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def run(
    changes: dict[str, Any],
    unit: ActivationCheckpointing,
    depths: Tensor | None,
    *,
    lanes: bool,
    documents: bool = True,
) -> Found:
    """Loss, gradients and the sums of notes after a backward."""
    config = toy_config(**changes)
    model = randomise(MythosModel(config, activation_checkpointing=unit)).double()
    if lanes:
        overlap(model)
    records, batch = ForwardRecords(details=True), toy_batch(config, batch=4)
    if not documents:
        del batch["positions"]
    options: dict[str, Any] = {"n_loops": LOOPS, "n_grad_loops": GRAD_LOOPS, "depths": depths}
    loss = model(**batch, **options, aux=AuxLoss(balance=0.3, z=0.02, scale=0.5), records=records)
    loss.backward()
    assert bool(records.lanes) == lanes
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    step = StepRecords(config, LOOPS, details=True, auxiliary=True, device=torch.device("cpu"))
    step.add(records)
    return loss.detach(), gradients, step.sums


@pytest.mark.parametrize("unit", ["none", "layer", "loop"])
@pytest.mark.parametrize(
    ("changes", "depths", "documents"),
    [
        ({}, None, True),
        (MLA, None, False),
        ({"injection": "post"}, None, True),
        ({"lora_target": "output", "recurrent_layers": 3}, [5, 2, 1, 4], True),
        ({"norm_placement": "after"}, [1, 1, 5, 3], False),
    ],
    ids=str,
)
def test_equal_to_the_whole(
    changes: dict[str, Any], depths: list[int] | None, documents: bool, unit: ActivationCheckpointing
) -> None:
    own = None if depths is None else torch.tensor(depths)
    loss, gradients, sums = run(changes, unit, own, lanes=False, documents=documents)
    again, found, added = run(changes, unit, own, lanes=True, documents=documents)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * scale, msg=name)
    for name, value in sums.items():
        if name in ("balance", "z") and own is not None:
            continue  # means whose weights follow from the depths, as lanes, like micro-batches, do not add up to
        exact = name in ("counts", "prebias_counts", "begun")
        torch.testing.assert_close(added[name], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7, msg=name)


def test_recomputing_is_bitwise_the_same_in_lanes() -> None:
    whole = run({}, "none", None, lanes=True)
    for unit in ("layer", "loop"):
        again = run({}, unit, None, lanes=True)  # type: ignore[arg-type]
        assert torch.equal(whole[0], again[0])
        assert all(torch.equal(again[1][name], gradient) for name, gradient in whole[1].items())


@pytest.mark.parametrize("unit", ["layer", "loop"])
def test_a_perturbed_recompute_keeps_the_choices_of_a_lane(unit: ActivationCheckpointing) -> None:
    for seed in range(5):
        config = toy_config()
        model = randomise(MythosModel(config, activation_checkpointing=unit), seed)
        overlap(model)
        with perturbed_recompute(model, 1.0, seed) as choices:
            batch = toy_batch(config, batch=4, seed=seed)
            model(**batch, n_loops=LOOPS, n_grad_loops=GRAD_LOOPS, records=ForwardRecords()).backward()
        assert len(choices.recompute) == 2 * GRAD_LOOPS
        assert choices.changed() == 0


def test_an_odd_number_of_sequences_runs_as_a_whole() -> None:
    model = MythosModel(toy_config())
    alone = model(torch.arange(12)[None], n_loops=3)
    overlap(model)
    assert torch.equal(model(torch.arange(12)[None], n_loops=3), alone)


class _Noted:
    """The journey of a lane, by number."""

    def __init__(self, journey: Journey, events: list[str], number: int):
        self.decision, self._journey, self._events, self._number = journey.decision, journey, events, number

    def hand_on(self) -> None:
        self._journey.hand_on()

    def send_back(self) -> None:
        self._journey.send_back()

    def hand_back(self) -> None:
        self._journey.hand_back()

    def compute(self, experts: Experts) -> None:
        self._events.append(f"compute {self._number}")
        self._journey.compute(experts)

    def receive(self, shared: Tensor | None, stream: Tensor | None) -> Tensor:
        self._events.append(f"receive {self._number}")
        return self._journey.receive(shared, stream)


class _Noting(LocalDispatcher):
    """Notes what lanes do: each sends its chunks, and then it is the other's turn."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._calls = 0

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        number, self._calls = self._calls // CHUNKS % 2, self._calls + 1
        self.events.append(f"send {number}")
        return _Noted(super().send(rows, weights, decision), self.events, number)


@pytest.mark.parametrize(("unit", "units"), [("none", [2]), ("loop", [2]), ("layer", [1, 1])])
def test_one_lane_goes_on_where_the_rows_of_the_other_are_under_way(
    unit: ActivationCheckpointing, units: list[int]
) -> None:
    """Inside a unit of layers no lane waits for rows that it has just sent."""
    config, dispatcher = toy_config(), _Noting()
    model = MythosModel(config, activation_checkpointing=unit)
    for layer in model.moe_layers():
        layer.dispatcher = dispatcher
    overlap(model)
    loss = model(**toy_batch(config, batch=4), n_loops=1)
    first = ["send 0", "send 1", "compute 0", "compute 1", "receive 0"]
    inside = ["send 0", "receive 1", "send 1", "compute 0", "compute 1", "receive 0"]
    expected = [event for layers in units for event in [*first, *inside * (layers - 1), "receive 1"]]
    assert dispatcher.events == [event for event in expected for _ in range(CHUNKS)]
    loss.backward()


def test_lanes_of_different_lengths_end_each_with_its_result() -> None:
    events = []

    def lane(name: str, stops: int) -> Any:
        for stop in range(stops):
            events.append(f"{name}{stop}")
            yield
        return name

    assert interleave([lane("a", 1), lane("b", 3)]) == ["a", "b"]
    assert events == ["a0", "b0", "b1", "b2"]
