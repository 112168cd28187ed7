"""A pipeline's step in time, where messages are carried out as NCCL does: a rank's messages of one communicator one
after the other in the order they were given, each when both ends are at it."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mythos_ds.costs.schedule import Action, ActionKind, actions_of, channel_of

MESSAGE_TIME = 0.1
"""Of one loop's forward on a stage."""
SENDS_IN_FLIGHT = 4
"""Messages that wait for their receiver before the sender does too, as in the executor."""
KINDS = {
    ActionKind.SEND_FORWARD: (True, "send"),
    ActionKind.RECEIVE_FORWARD: (True, "recv"),
    ActionKind.SEND_BACKWARD: (False, "send"),
    ActionKind.RECEIVE_BACKWARD: (False, "recv"),
}
Message = tuple[bool, int, int]
"""Forward or gradient, virtual stage whose result it is of, micro-batch."""
Communicator = Callable[[int, bool, str], Any]
"""What a message of edge, direction and end is given to; None: every message has one of its own."""


@dataclass(frozen=True)
class Shape:
    """A pipeline: stages, micro-batches, visits of each stage, and how many of the last visits carry gradient."""

    n_stages: int
    n_micro_batches: int
    n_visits: int
    n_grad_visits: int
    ring: bool = True

    @classmethod
    def of_ring(cls, n_stages: int, n_micro_batches: int, n_loops: int, n_grad_loops: int) -> "Shape":
        """A ring: a visit for the prelude, one for each loop, and one for the coda."""
        return cls(n_stages, n_micro_batches, n_loops + 2, n_grad_loops + 1)

    @property
    def last(self) -> int:
        """The last virtual stage."""
        return self.n_stages * self.n_visits - 1

    def has_gradient(self, virtual: int) -> bool:
        """Whether a virtual stage's result does: the prelude's always."""
        visit = virtual // self.n_stages
        return visit == 0 or visit >= self.n_visits - self.n_grad_visits

    def cost(self, visit: int, *, backward: bool) -> float:
        """A loop's forward is 1 and its backward 3; prelude and coda half and one of it, and twice that."""
        inside = 0 < visit < self.n_visits - 1 or self.n_visits == 1
        forward = 0.5 if visit == 0 and not inside else 1.0
        return forward if not backward else (3.0 if inside else 2.0) * forward


def channels(shape: Shape) -> Communicator:
    """Those of the executor."""
    return lambda edge, forward, end: channel_of(edge, shape.n_stages, forward=forward, ring=shape.ring)


def one_for_all(edge: int, forward: bool, end: str) -> Any:
    """All messages of a rank on one communicator."""
    return "all"


def none_waits(edge: int, forward: bool, end: str) -> Any:
    """No message waits for another."""
    return None


class Step:
    """One optimizer step, simulated."""

    def __init__(self, shape: Shape, communicator: Communicator):
        self.shape, self.communicator = shape, communicator
        stages = range(shape.n_stages)
        sizes = shape.n_stages, shape.n_visits, shape.n_micro_batches
        self.actions = [actions_of(stage, *sizes, training=True) for stage in stages]
        self.places, self.clocks, self.busy = [0 for _ in stages], [0.0 for _ in stages], [0.0 for _ in stages]
        self.in_flight: list[deque[Message]] = [deque() for _ in stages]
        self.queues: dict[Any, deque[Message]] = defaultdict(deque)
        self.freed: dict[Any, float] = defaultdict(float)
        self.given: dict[Message, dict[str, tuple[Any, float]]] = defaultdict(dict)
        self.arrived: dict[Message, float] = {}

    def idle_share(self) -> float:
        """Over all stages, 0..1. Raises ValueError where the stages wait for each other."""
        moved = True
        while moved:
            moved = any([self._advance(stage) for stage in range(self.shape.n_stages)])
        if any(place < len(own) for place, own in zip(self.places, self.actions, strict=True)):
            raise ValueError(f"{self.shape}: the stages wait for each other")
        return 1.0 - sum(self.busy) / (self.shape.n_stages * max(self.clocks))

    def _advance(self, stage: int) -> bool:
        start = self.places[stage]
        while self.places[stage] < len(self.actions[stage]) and self._done(
            stage, self.actions[stage][self.places[stage]]
        ):
            self.places[stage] += 1
        return self.places[stage] > start

    def _done(self, stage: int, action: Action) -> bool:
        """Carries an action out, unless it waits for a message that has not come."""
        virtual = action.visit * self.shape.n_stages + stage
        if action.kind in KINDS:
            return self._give(stage, virtual, action)
        backward = action.kind is ActionKind.BACKWARD
        if backward and not self.shape.has_gradient(virtual):
            return True
        needs = virtual < self.shape.last if backward else virtual > 0
        message = (not backward, virtual if backward else virtual - 1, action.micro_batch)
        if needs and not self._waited(stage, message):
            return False
        cost = self.shape.cost(action.visit, backward=backward)
        self.clocks[stage] += cost
        self.busy[stage] += cost
        return True

    def _give(self, stage: int, virtual: int, action: Action) -> bool:
        forward, end = KINDS[action.kind]
        # Results are of the sender, gradients of the receiver of the gradient.
        of = virtual if (end == "send") == forward else virtual - 1
        if not forward and not self.shape.has_gradient(of):
            return True
        flying = self.in_flight[stage]
        if end == "send" and len(flying) > SENDS_IN_FLIGHT:
            if not self._waited(stage, flying[0]):
                return False
            flying.popleft()
        message = (forward, of, action.micro_batch)
        name = self.communicator(of % self.shape.n_stages, forward, end)
        queue = (stage, message if name is None else name)
        self.given[message][end] = queue, self.clocks[stage]
        self.queues[queue].append(message)
        if end == "send":
            flying.append(message)
        self._settle(message)
        return True

    def _waited(self, stage: int, message: Message) -> bool:
        if message not in self.arrived:
            return False
        self.clocks[stage] = max(self.clocks[stage], self.arrived[message])
        return True

    def _settle(self, message: Message) -> None:
        """Carries a message out where both ends are at it, and what that lets come to its turn."""
        ends = self.given[message]
        if len(ends) < 2 or any(self.queues[queue][0] != message for queue, _ in ends.values()):
            return
        start = max(max(given, self.freed[queue]) for queue, given in ends.values())
        self.arrived[message] = start + MESSAGE_TIME
        for queue, _ in ends.values():
            self.queues[queue].popleft()
            self.freed[queue] = self.arrived[message]
        for queue, _ in ends.values():
            if self.queues[queue]:
                self._settle(self.queues[queue][0])
