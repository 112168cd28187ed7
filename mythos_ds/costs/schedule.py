"""The order in which the stages of a pipeline compute, send and receive: read by the planner and by the executor. Pure.

The ring is interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473): in turn v, a stage s works as virtual stage
v * n_stages + s, and what it does there on one micro-batch is a visit. The loop count is the interleaving factor; with
one visit per stage the order is plain 1F1B. A test holds the orders equal to those
of torch.distributed.pipelining.
"""

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

_CACHED = 256


class ActionKind(StrEnum):
    """What an action does; the values are torch's names."""

    FORWARD = "FORWARD"
    BACKWARD = "FULL_BACKWARD"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"


_SENDS = {ActionKind.FORWARD: ActionKind.SEND_FORWARD, ActionKind.BACKWARD: ActionKind.SEND_BACKWARD}


class Action(NamedTuple):
    """One thing a stage does, for one visit of one micro-batch."""

    kind: ActionKind
    visit: int
    micro_batch: int

    @property
    def backward(self) -> bool:
        """Whether it is a backward."""
        return self.kind is ActionKind.BACKWARD


class Channel(NamedTuple):
    """What a message travels on: edges of a colour share no stage, so a stage only sends or only receives on it. On
    NCCL, which carries out a communicator's messages in the order they were given, none waits for one of another role.
    """

    forward: bool
    colour: int


Order = tuple[tuple[Action, ...], ...]
"""What each stage does, in order."""

Slots = tuple[tuple[Action | None, ...], ...]
"""The same by slots of time; None: idle."""


def channel_of(edge: int, n_stages: int, *, forward: bool, ring: bool) -> Channel:
    """The channel of a result (`forward`) or gradient between stage `edge` and the one after it. Even and odd edges
    alternate; the last of a ring with an odd number of stages meets both."""
    meets_both = ring and n_stages % 2 == 1 and edge == n_stages - 1
    return Channel(forward, 2 if meets_both else edge % 2)


def channel_edges(n_stages: int, *, ring: bool) -> dict[Channel, list[tuple[int, int]]]:
    """All channels of a pipeline in one order, with the pairs of stages that each connects."""
    edges: dict[Channel, list[tuple[int, int]]] = {}
    for forward in (True, False):
        for edge in range(n_stages if ring else n_stages - 1):
            channel = channel_of(edge, n_stages, forward=forward, ring=ring)
            edges.setdefault(channel, []).append((edge, (edge + 1) % n_stages))
    return edges


def ring_visits(n_loops: int) -> int:
    """Times that a micro-batch comes by each stage of a ring: for the prelude, for every loop, for the coda."""
    return n_loops + 2


def forward(visit: int, micro_batch: int) -> Action:
    """The forward of one visit of one micro-batch."""
    return Action(ActionKind.FORWARD, visit, micro_batch)


def backward(visit: int, micro_batch: int) -> Action:
    """The backward of one visit of one micro-batch."""
    return Action(ActionKind.BACKWARD, visit, micro_batch)


def training_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    """The computations of one optimizer step, by stage.

    Raises ValueError where n_visits > 1 and n_micro_batches is no multiple of max(1, n_micro_batches // n_stages).
    """
    if n_visits == 1:
        return one_forward_one_backward_order(n_stages, n_micro_batches)
    return interleaved_order(n_stages, n_visits, n_micro_batches)


def interleaved_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    """Interleaved 1F1B, as torch's ScheduleInterleaved1F1B.

    Raises ValueError where n_micro_batches is no multiple of max(1, n_micro_batches // n_stages), the rounds.
    """
    slots = _interleaved_slots(n_stages, n_visits, n_micro_batches)
    return tuple(tuple(action for action in own if action is not None) for own in slots)


def _interleaved_slots(n_stages: int, n_visits: int, n_micro_batches: int) -> Slots:
    """Interleaved 1F1B by slots of time, None where a stage idles if forwards and backwards took one slot each."""
    rounds = max(1, n_micro_batches // n_stages)
    if n_micro_batches % rounds:
        raise ValueError(f"{n_micro_batches} micro-batches; allowed: a multiple of the {rounds} rounds")
    per_round = n_micro_batches // rounds
    places = [
        (visit, m)
        for first in range(0, n_micro_batches, per_round)
        for visit in range(n_visits)
        for m in range(first, first + per_round)
    ]
    forwards = [forward(visit, m) for visit, m in places]
    backwards = [backward(n_visits - 1 - visit, m) for visit, m in places]
    slots = []
    for stage in range(n_stages):
        later = 2 * (n_stages - 1 - stage)
        ahead = min((n_visits - 1) * per_round + later, len(forwards))
        first_backward = n_visits * n_stages + later
        steady, left = _alternate(forwards, backwards, ahead)
        wait = first_backward - ahead - stage
        cooled = [slot for action in left for slot in (None, action)]
        slots.append((*_idle(stage), *forwards[:ahead], *_idle(wait), *steady, *cooled))
    return tuple(slots)


def _idle(count: int) -> list[None]:
    return [None] * count


def one_forward_one_backward_order(n_stages: int, n_micro_batches: int) -> Order:
    """1F1B with one visit per stage (Narayanan et al. 2019, arXiv 1806.03377), as torch's Schedule1F1B."""
    forwards = [forward(0, m) for m in range(n_micro_batches)]
    backwards = [backward(0, m) for m in range(n_micro_batches)]
    order = []
    for stage in range(n_stages):
        ahead = min(n_stages - 1 - stage, n_micro_batches)
        steady, left = _alternate(forwards, backwards, ahead)
        order.append((*forwards[:ahead], *steady, *left))
    return tuple(order)


def evaluation_order(n_stages: int, n_visits: int, n_micro_batches: int) -> Order:
    """Forwards alone: rounds of n_stages micro-batches go through all visits, one round after the other."""
    own = tuple(
        forward(visit, m)
        for first in range(0, n_micro_batches, n_stages)
        for visit in range(n_visits)
        for m in range(first, min(first + n_stages, n_micro_batches))
    )
    return (own,) * n_stages


def _alternate(forwards: list[Action], backwards: list[Action], ahead: int) -> tuple[list[Action], list[Action]]:
    """After `ahead` forwards: a forward and a backward in turn; and the backwards that are left."""
    pairs = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return pairs, backwards[len(backwards) - ahead :]


def actions_of(stage: int, n_stages: int, n_visits: int, n_micro_batches: int, training: bool) -> tuple[Action, ...]:
    """All actions of one stage for one optimizer step, or for forwards alone where not `training`.

    Raises ValueError as `training_order`.
    """
    return _with_messages(n_stages, n_visits, n_micro_batches, training)[stage]


@lru_cache(maxsize=_CACHED)
def _with_messages(n_stages: int, n_visits: int, n_micro_batches: int, training: bool) -> Order:
    """The order with its messages: a result is sent right after it is computed, and its receive is posted in the
    receiver's order at that slot. Receives so stand before anything that depends on later messages: even sends that
    block would not deadlock. Raises ValueError where the order waits for itself."""
    if not training:
        slots: Slots = evaluation_order(n_stages, n_visits, n_micro_batches)
    elif n_visits == 1:
        slots = one_forward_one_backward_order(n_stages, n_micro_batches)
    else:
        slots = _interleaved_slots(n_stages, n_visits, n_micro_batches)
    complete: list[list[Action]] = [[] for _ in slots]
    arrived: list[set[Action]] = [set() for _ in slots]
    positions = [0] * n_stages
    while any(position < len(own) for position, own in zip(positions, slots, strict=True)):
        before = list(positions)
        for stage, own in enumerate(slots):
            if positions[stage] == len(own):
                continue
            action = own[positions[stage]]
            if action is not None:
                needed = received_by(stage, action, n_stages, n_visits)
                if needed is not None and needed not in arrived[stage]:
                    continue
                complete[stage].append(action)
                if (target := receiver_of(stage, action, n_stages, n_visits)) is not None:
                    other, received = target
                    complete[stage].append(action._replace(kind=_SENDS[action.kind]))
                    complete[other].append(received)
                    arrived[other].add(received)
            positions[stage] += 1
        if positions == before:
            raise ValueError("the stages of the order wait for each other")
    return tuple(tuple(own) for own in complete)


def received_by(stage: int, action: Action, n_stages: int, n_visits: int) -> Action | None:
    """The receive that a computation needs; None where it needs none: the first forward and the last backward."""
    virtual = action.visit * n_stages + stage
    if action.kind is ActionKind.FORWARD:
        return action._replace(kind=ActionKind.RECEIVE_FORWARD) if virtual else None
    return action._replace(kind=ActionKind.RECEIVE_BACKWARD) if virtual < n_stages * n_visits - 1 else None


def receiver_of(stage: int, action: Action, n_stages: int, n_visits: int) -> tuple[int, Action] | None:
    """The stage that a computation's result goes to, and its receive; None where it goes nowhere."""
    virtual = action.visit * n_stages + stage
    if action.kind is ActionKind.FORWARD:
        kind, target = ActionKind.RECEIVE_FORWARD, virtual + 1
    else:
        kind, target = ActionKind.RECEIVE_BACKWARD, virtual - 1
    if not 0 <= target < n_stages * n_visits:
        return None
    visit, other = divmod(target, n_stages)
    return other, Action(kind, visit, action.micro_batch)
