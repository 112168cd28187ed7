"""Whether what a run sent over gloo would have worked on NCCL, which gloo does not ask for.

`Referee` notes what one process hands to its process groups. `problems` reads the notes of all ranks: members of a
group must call the same collectives in the same order; collectives of groups that overlap must come in one order on all
ranks; and a message between two ranks takes place when both are at it, each rank carrying out what it gave to a
communicator in the order it gave it. `mixed_roles` finds communicators on which a rank both sends and receives.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as torch_distributed
from torch import Tensor

SENT, RECEIVED = "send", "recv"
GATHERS, UNEVEN = ("allgather", "all_gather", "_allgather"), ("alltoall", "all_to_all")
"""How the names of a process group's methods begin, in any torch. UNEVEN: ranks may hand over other shapes."""
COLLECTIVES = (*GATHERS, *UNEVEN, "allreduce", "reduce", "_reduce", "broadcast", "gather", "scatter", "barrier")

Event = dict[str, Any]
"""A collective or message: group, ranks, op, shapes, dtypes, for messages also peer (a rank) and number; or `waited`:
the number of a message that the process waited for."""


class _Watched:
    """A message on its way, whose wait is noted."""

    def __init__(self, work: torch_distributed.Work, events: list[Event], number: int):
        self._work, self._events, self._number = work, events, number

    def wait(self, *args: Any) -> bool:
        """Wait for the message."""
        self._events.append({"waited": self._number})
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Referee:
    """The notes of this process, in order, while `watching`."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @contextmanager
    def watching(self) -> Iterator["Referee"]:
        """Note what is handed to any process group meanwhile."""
        owner = torch_distributed.ProcessGroup
        methods = {name: method for name, method in vars(owner).items() if name.startswith(COLLECTIVES)}
        methods |= {name: vars(owner)[name] for name in (SENT, RECEIVED)}
        try:
            for name in methods:
                setattr(owner, name, self._noting(name, getattr(owner, name)))
            yield self
        finally:
            for name, method in methods.items():
                setattr(owner, name, method)

    def take(self) -> list[Event]:
        """What was noted since the last call."""
        taken, self.events = self.events, []
        return taken

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noting(group: torch_distributed.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            ranks = torch_distributed.get_process_group_ranks(group)
            tensors = list(_tensors([*args, *kwargs.values()]))
            event: Event = {"group": group.group_name, "ranks": ranks, "op": name}
            event |= {"shapes": [list(t.shape) for t in tensors], "dtypes": [str(t.dtype) for t in tensors]}
            self.events.append(event)
            if name not in (SENT, RECEIVED):
                return original(group, *args, **kwargs)
            number = len(self.events)
            event |= {"peer": ranks[args[1]], "number": number}
            return _Watched(original(group, *args, **kwargs), self.events, number)

        return noting


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def refereed() -> Iterator[Referee]:
    """A referee that watches."""
    with Referee().watching() as referee:
        yield referee


def problems(logs: Sequence[Sequence[Event]]) -> list[str]:
    """What would fail or hang, of the notes of all ranks by rank; empty where nothing would."""
    found = _differing_collectives(logs) + _differing_messages(logs)
    return found or _stuck(logs)


def mixed_roles(logs: Sequence[Sequence[Event]]) -> list[str]:
    """Communicators on which a rank sends and receives: what it receives early there holds up what it sends later."""
    roles: dict[tuple[int, str], set[str]] = defaultdict(set)
    for rank, events in enumerate(logs):
        for event in events:
            if event.get("op") in (SENT, RECEIVED):
                roles[rank, event["group"]].add(event["op"])
    return [f"rank {rank} sends and receives on {group}" for (rank, group), both in roles.items() if len(both) > 1]


def _differing_collectives(logs: Sequence[Sequence[Event]]) -> list[str]:
    sequences: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    members: dict[str, list[int]] = {}
    for rank, events in enumerate(logs):
        for event in events:
            if "number" not in event and "waited" not in event:
                shapes = None if event["op"].startswith(UNEVEN) else event["shapes"]
                sequences[event["group"]][rank].append((event["op"], event["dtypes"], shapes))
                members[event["group"]] = event["ranks"]
    found = []
    for group, by_rank in sequences.items():
        first, *others = members[group]
        for rank in others:
            if by_rank[rank] != by_rank[first]:
                pairs = enumerate(zip(by_rank[first], by_rank[rank], strict=False))
                shorter = min(len(by_rank[first]), len(by_rank[rank]))
                place, (one, other) = next(
                    (entry for entry in pairs if entry[1][0] != entry[1][1]), (shorter, ("", ""))
                )
                found.append(
                    f"group {group} of {members[group]}, call {place}: rank {first} {one}, rank {rank} {other}"
                )
    return found


def _differing_messages(logs: Sequence[Sequence[Event]]) -> list[str]:
    ends: dict[tuple[str, int, int], tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for rank, events in enumerate(logs):
        for event in events:
            if "number" in event:
                sends = event["op"] == SENT
                key = (event["group"], rank, event["peer"]) if sends else (event["group"], event["peer"], rank)
                ends[key][0 if sends else 1].append((event["shapes"], event["dtypes"]))
    return [f"messages {key}: sent {sent}, awaited {due}" for key, (sent, due) in ends.items() if sent != due]


class _Replay:
    """All ranks run through their notes. Collectives wait for their end; messages only where the process waited."""

    def __init__(self, logs: Sequence[Sequence[Event]]):
        self.logs = logs
        self.places = [0] * len(logs)
        self.queues: dict[tuple[int, str], deque[Any]] = defaultdict(deque)
        self.counts: dict[Any, int] = defaultdict(int)
        self.participants: dict[Any, list[int]] = {}
        self.ended: set[Any] = set()
        self.given: list[dict[int, Any]] = [{} for _ in logs]
        self.blocked: list[Any] = [None] * len(logs)

    def run(self) -> bool:
        """Whether all come to their end."""
        moved = True
        while moved:
            moved = False
            for rank in range(len(self.logs)):
                moved |= self._advance(rank)
        return all(place == len(log) for place, log in zip(self.places, self.logs, strict=True))

    def _advance(self, rank: int) -> bool:
        moved = False
        while self.places[rank] < len(self.logs[rank]):
            if self.blocked[rank] is None:
                event = self.logs[rank][self.places[rank]]
                self.blocked[rank] = self.given[rank][event["waited"]] if "waited" in event else self._give(rank, event)
            if self.blocked[rank] is not _NOTHING and self.blocked[rank] not in self.ended:
                return moved
            self.blocked[rank] = None
            self.places[rank] += 1
            moved = True
        return moved

    def _give(self, rank: int, event: Event) -> Any:
        """Hand an operation to its communicator; what the process then waits for."""
        group = event["group"]
        if "number" in event:
            pair = (rank, event["peer"]) if event["op"] == SENT else (event["peer"], rank)
            counter, participants = (group, event["op"], *pair), list(pair)
            key = ("message", group, *pair, self.counts[counter])
            self.given[rank][event["number"]] = key
        else:
            counter, participants = (group, rank), event["ranks"]
            key = ("collective", group, self.counts[counter])
        self.counts[counter] += 1
        self.participants[key] = participants
        self.queues[rank, group].append(key)
        self._settle(group, key)
        return _NOTHING if "number" in event else key

    def _settle(self, group: str, key: Any) -> None:
        """End what all its ranks are at, and what that lets come to its turn."""
        ranks = self.participants[key]
        if any(not self.queues[rank, group] or self.queues[rank, group][0] != key for rank in ranks):
            return
        self.ended.add(key)
        for rank in ranks:
            self.queues[rank, group].popleft()
        for rank in ranks:
            if self.queues[rank, group]:
                self._settle(group, self.queues[rank, group][0])


_NOTHING = object()


def _stuck(logs: Sequence[Sequence[Event]]) -> list[str]:
    replay = _Replay(logs)
    if replay.run():
        return []
    places = zip(range(len(logs)), replay.places, logs, strict=True)
    waiting = [f"rank {rank} at {log[place]}" for rank, place, log in places if place < len(log)]
    return ["the ranks wait for each other: " + "; ".join(waiting)]
