"""The order of the pipeline's stages is torch's, message by message."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

from mythos_ds.costs.schedule import (
    Action,
    ActionKind,
    Order,
    actions_of,
    backward,
    evaluation_order,
    forward,
    interleaved_order,
    one_forward_one_backward_order,
)


def from_torch(actions: Any, n_stages: int) -> tuple[Action, ...]:
    """One rank's actions as ours, without torch's idle slots."""
    return tuple(
        Action(ActionKind(_NAMES[a.computation_type]), a.stage_index // n_stages, a.microbatch_index)
        for a in actions
        if a is not None
    )


_NAMES = {_ComputationType[kind.value]: kind.value for kind in ActionKind}


def torch_interleaved(n_stages: int, n_visits: int, n_micro_batches: int) -> dict[int, list[Any]]:
    """torch's order with its idle slots, by rank."""
    stage: Any = SimpleNamespace(
        num_stages=n_stages * n_visits, group_size=n_stages, group_rank=0, stage_index_to_group_rank={}
    )
    schedule = ScheduleInterleaved1F1B([stage] * n_visits, n_micro_batches)
    return {rank: list(actions) for rank, actions in schedule.pipeline_order.items()}


def with_torchs_messages(order: dict[int, list[Any]], n_stages: int, n_visits: int) -> Order:
    """What torch's runtime would do, by rank."""
    complete = _add_send_recv(order, lambda virtual: virtual % n_stages, n_stages * n_visits)
    return tuple(from_torch(complete[rank], n_stages) for rank in range(n_stages))


def for_torch(order: Order) -> dict[int, list[Any]]:
    """Our computations as torch's actions."""
    return {
        stage: [_Action(a.visit * len(order) + stage, _ComputationType[a.kind.value], a.micro_batch) for a in own]
        for stage, own in enumerate(order)
    }


def ours(n_stages: int, n_visits: int, n_micro_batches: int, *, training: bool = True) -> Order:
    """All stages' actions."""
    return tuple(actions_of(stage, n_stages, n_visits, n_micro_batches, training) for stage in range(n_stages))


def accepted(n_stages: int, n_visits: int) -> Iterator[tuple[int, dict[int, list[Any]]]]:
    """Counts of micro-batches with torch's order for them; ours must refuse the others too."""
    for n_micro_batches in range(1, 2 * n_stages + 4):
        try:
            yield n_micro_batches, torch_interleaved(n_stages, n_visits, n_micro_batches)
        except ValueError:
            with pytest.raises(ValueError, match=f"^{n_micro_batches} micro-batches; allowed: a multiple of the"):
                interleaved_order(n_stages, n_visits, n_micro_batches)


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("n_visits", [3, 4, 7])
def test_the_ring_runs_in_torchs_order(n_stages: int, n_visits: int) -> None:
    uneven = 0
    for n_micro_batches, expected in accepted(n_stages, n_visits):
        uneven += n_micro_batches % n_stages > 0
        computed = tuple(from_torch(expected[rank], n_stages) for rank in range(n_stages))
        assert interleaved_order(n_stages, n_visits, n_micro_batches) == computed
        assert ours(n_stages, n_visits, n_micro_batches) == with_torchs_messages(expected, n_stages, n_visits)
    assert uneven, "some counts are no multiples of the stages"


@pytest.mark.parametrize("n_micro_batches", [3, 4, 5, 8, 17])
def test_literal_stages_run_in_torchs_order(n_micro_batches: int) -> None:
    stage: Any = SimpleNamespace(num_stages=3)
    expected: Any = Schedule1F1B(stage, n_micro_batches)._get_pipeline_order()
    order = one_forward_one_backward_order(3, n_micro_batches)
    for rank, own in enumerate(order):
        listed = from_torch([a for a in expected[rank] if a is None or a.computation_type in _NAMES], 3)
        # torch 2.13's listing, not its execution, numbers the last stage's forwards from 1.
        start = listed[0].micro_batch
        assert own == tuple(a if a.backward else forward(0, a.micro_batch - start) for a in listed)
    assert ours(3, 1, n_micro_batches) == with_torchs_messages(for_torch(order), 3, 1)


@pytest.mark.parametrize(("n_stages", "n_visits", "n_micro_batches"), [(2, 5, 4), (4, 6, 10), (3, 1, 4), (3, 1, 7)])
def test_messages_of_an_evaluation(n_stages: int, n_visits: int, n_micro_batches: int) -> None:
    order = evaluation_order(n_stages, n_visits, n_micro_batches)
    assert ours(n_stages, n_visits, n_micro_batches, training=False) == with_torchs_messages(
        for_torch(order), n_stages, n_visits
    )
    assert all(action.kind is ActionKind.FORWARD for own in order for action in own)


def test_two_stages_by_hand() -> None:
    """One micro-batch goes there and back."""
    assert actions_of(0, 2, 1, 1, True) == (
        forward(0, 0),
        Action(ActionKind.SEND_FORWARD, 0, 0),
        Action(ActionKind.RECEIVE_BACKWARD, 0, 0),
        backward(0, 0),
    )
    assert actions_of(1, 2, 1, 1, True) == (
        Action(ActionKind.RECEIVE_FORWARD, 0, 0),
        forward(0, 0),
        backward(0, 0),
        Action(ActionKind.SEND_BACKWARD, 0, 0),
    )
