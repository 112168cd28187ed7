"""What each pipeline stage does in which order: computation, sends and receives as plain actions.

The ring is the interleaved 1F1B of torch.distributed.pipelining (Narayanan et al. 2021) over virtual stages
visit * n_stages + stage: the loop count is the interleaving factor. With one visit per stage it is plain 1F1B. Receives
are posted before anything that depends on later messages, so that even blocking sends would not deadlock.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

_CACHED = 256

Order = dict[int, list[_Action | None]]


class Kind(Enum):
    """What an action does; the values are torch's names."""

    FORWARD = "FORWARD"
    BACKWARD = "FULL_BACKWARD"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"


@dataclass(frozen=True)
class Action:
    """One thing a stage does, for one visit of one micro-batch."""

    kind: Kind
    visit: int
    micro_batch: int


@lru_cache(maxsize=_CACHED)
def actions_of(
    stage: int, n_stages: int, n_visits: int, n_micro_batches: int, training: bool
) -> tuple[Action, ...]:
    """The actions of one stage for one optimizer step, or for forwards alone where not `training`.

    Raises ValueError where n_visits > 1 and n_micro_batches is no multiple of max(1, n_micro_batches // n_stages).
    """
    if not training:
        order = _forward_order(n_stages, n_visits, n_micro_batches)
    elif n_visits == 1:
        order = {rank: _one_forward_one_backward(rank, n_stages, n_micro_batches) for rank in range(n_stages)}
    else:
        order = _interleaved_order(n_stages, n_visits, n_micro_batches)
    complete: Any = _add_send_recv(cast(Any, order), lambda virtual: virtual % n_stages, n_stages * n_visits)
    return tuple(
        Action(Kind(action.computation_type.name), action.stage_index // n_stages, action.microbatch_index)
        for action in complete[stage]
    )


def _interleaved_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    # All that the schedule reads of its stages when it is only asked for the order.
    stage = SimpleNamespace(
        num_stages=n_stages * n_visits, group_size=n_stages, group_rank=0, stage_index_to_group_rank={}
    )
    schedule = ScheduleInterleaved1F1B([stage] * n_visits, n_micro_batches)  # type: ignore[list-item]
    return {rank: list(actions) for rank, actions in schedule.pipeline_order.items()}


def _one_forward_one_backward(stage: int, n_stages: int, n_micro_batches: int) -> list[_Action | None]:
    """1F1B (Narayanan et al. 2019); torch has it only as an executor for one stage per process."""
    forwards = [_Action(stage, _ComputationType.FORWARD, m) for m in range(n_micro_batches)]
    backwards = [_Action(stage, _ComputationType.FULL_BACKWARD, m) for m in range(n_micro_batches)]
    ahead = min(n_stages - 1 - stage, n_micro_batches)
    pairs = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return [*forwards[:ahead], *pairs, *backwards[n_micro_batches - ahead :]]


def _forward_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    """Rounds of n_stages micro-batches go through all visits, one round after the other."""
    return {
        stage: [
            _Action(visit * n_stages + stage, _ComputationType.FORWARD, m)
            for first in range(0, n_micro_batches, n_stages)
            for visit in range(n_visits)
            for m in range(first, min(first + n_stages, n_micro_batches))
        ]
        for stage in range(n_stages)
    }
