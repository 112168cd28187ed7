"""What each pipeline stage does in which order: computation, sends and receives as plain actions.

The ring is the interleaved 1F1B of torch.distributed.pipelining (Narayanan et al. 2021) over virtual stages
visit * n_stages + stage: the loop count is the interleaving factor. With one visit per stage it is plain 1F1B. Receives
are posted before anything that depends on later messages, so that even blocking sends would not deadlock.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from mythos_ds.errors import ParallelError

_CACHED = 256
_FIRST_TORCH = (2, 9)

Order = dict[int, list[Any]]
"""torch's own actions in the order of each stage, without communication."""


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
def actions_of(stage: int, n_stages: int, n_visits: int, n_micro_batches: int, training: bool) -> tuple[Action, ...]:
    """The actions of one stage for one optimizer step, or for forwards alone where not `training`.

    Raises ValueError where n_visits > 1 and n_micro_batches is no multiple of max(1, n_micro_batches // n_stages).
    """
    from torch.distributed.pipelining.schedules import _add_send_recv

    if not training:
        order = _forward_order(n_stages, n_visits, n_micro_batches)
    elif n_visits == 1:
        order = {rank: _one_forward_one_backward(rank, n_stages, n_micro_batches) for rank in range(n_stages)}
    else:
        order = _interleaved_order(n_stages, n_visits, n_micro_batches)
    complete: Any = _add_send_recv(order, lambda virtual: virtual % n_stages, n_stages * n_visits)
    return tuple(
        Action(Kind(action.computation_type.name), action.stage_index // n_stages, action.microbatch_index)
        for action in complete[stage]
    )


def require_torch(version: str = torch.__version__) -> None:
    """Raises ParallelError where torch is too old for the pipeline: gradients in another dtype than the weights, and
    backwards from edges of the graph. Checked on torch 2.13."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < _FIRST_TORCH:
        first = ".".join(map(str, _FIRST_TORCH))
        raise ParallelError(
            f"parallel.pp_size: the pipeline needs torch >= {first}, this is {version}; nearest: pp_size 1."
        )


def _interleaved_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    # All that the schedule reads of its stages when it is only asked for the order.
    stage = SimpleNamespace(
        num_stages=n_stages * n_visits, group_size=n_stages, group_rank=0, stage_index_to_group_rank={}
    )
    schedule = ScheduleInterleaved1F1B([stage] * n_visits, n_micro_batches)  # type: ignore[list-item]
    return {rank: list(actions) for rank, actions in schedule.pipeline_order.items()}


def _one_forward_one_backward(stage: int, n_stages: int, n_micro_batches: int) -> list[Any]:
    """1F1B (Narayanan et al. 2019); torch has it only as an executor for one stage per process."""
    forwards = [_computation(stage, Kind.FORWARD, m) for m in range(n_micro_batches)]
    backwards = [_computation(stage, Kind.BACKWARD, m) for m in range(n_micro_batches)]
    ahead = min(n_stages - 1 - stage, n_micro_batches)
    pairs = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return [*forwards[:ahead], *pairs, *backwards[n_micro_batches - ahead :]]


def _forward_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    """Rounds of n_stages micro-batches go through all visits, one round after the other."""
    return {
        stage: [
            _computation(visit * n_stages + stage, Kind.FORWARD, m)
            for first in range(0, n_micro_batches, n_stages)
            for visit in range(n_visits)
            for m in range(first, min(first + n_stages, n_micro_batches))
        ]
        for stage in range(n_stages)
    }


def _computation(virtual_stage: int, kind: Kind, micro_batch: int) -> Any:
    from torch.distributed.pipelining.schedules import _Action, _ComputationType

    return _Action(virtual_stage, _ComputationType[kind.value], micro_batch)
