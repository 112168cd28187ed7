"""Whether what ranks issued, in the order in which they issued it, can be carried without a deadlock and matches.

A communicator of NCCL carries one operation after the other, and communicators whose ranks overlap must be used in one
order everywhere. So: the operations of a group are the same on all its ranks, each send has its receive, and the orders
of all ranks together have no cycle.
"""

from collections import Counter, defaultdict
from itertools import pairwise, permutations
from typing import Any

Log = list[dict[str, Any]]
Key = tuple[Any, ...]
MESSAGES = ("send", "receive")


def differences(logs: list[Log]) -> list[str]:
    """Operations that the ranks of a group do not issue alike; `logs` by rank."""
    found = []
    for group in sorted({tuple(entry["group"]) for log in logs for entry in log}):
        own = {rank: [entry for entry in logs[rank] if _of(entry, group)] for rank in group}
        series = {rank: [_collective(entry) for entry in log if not _message(entry)] for rank, log in own.items()}
        first = series[group[0]]
        for rank, mine in series.items():
            if mine != first:
                shorter = min(len(mine), len(first))
                at = next((i for i in range(shorter) if mine[i] != first[i]), shorter)
                found.append(f"group {list(group)}: rank {rank} differs from rank {group[0]} at operation {at}")
        for sender, receiver in permutations(group, 2):
            sent = [_size(e) for e in own[sender] if e["kind"] == "send" and e["peer"] == receiver]
            got = [_size(e) for e in own[receiver] if e["kind"] == "receive" and e["peer"] == sender]
            if sent != got:
                counts = f"{len(sent)} messages of rank {sender} to {receiver}, {len(got)} received"
                found.append(f"group {list(group)}: {counts}" + (", of other sizes" if len(sent) == len(got) else ""))
    return found


def stuck(logs: list[Log]) -> int:
    """Operations that could never begin, as each waits for one before it: 0 where one order of all collectives suits
    every rank, and one order of the messages of each group every rank of it."""
    collective = [[entry for entry in log if not _message(entry)] for log in logs]
    count = _stuck([_nodes(log, rank) for rank, log in enumerate(collective)])
    for group in {tuple(entry["group"]) for log in logs for entry in log if _message(entry)}:
        own = [[entry for entry in log if _of(entry, group) and _message(entry)] for log in logs]
        count += _stuck([_nodes(log, rank) for rank, log in enumerate(own)])
    return count


def _nodes(log: Log, rank: int) -> list[Key]:
    """The rank's operations, each by a name that all its ranks have for it."""
    seen: Counter[Key] = Counter()
    nodes = []
    for entry in log:
        group = tuple(entry["group"])
        key: Key = (group,)
        if _message(entry):
            ends = (rank, entry["peer"]) if entry["kind"] == "send" else (entry["peer"], rank)
            key = (group, ends)
        nodes.append((*key, seen[key]))
        seen[key] += 1
    return nodes


def _stuck(orders: list[list[Key]]) -> int:
    """What is left when operations that nothing precedes are taken away, again and again (Kahn 1962)."""
    following: dict[Key, set[Key]] = defaultdict(set)
    preceding: Counter[Key] = Counter()
    nodes = {node for order in orders for node in order}
    for order in orders:
        for before, after in pairwise(order):
            if after not in following[before]:
                following[before].add(after)
                preceding[after] += 1
    free = [node for node in nodes if not preceding[node]]
    while free:
        node = free.pop()
        nodes.discard(node)
        for after in following[node]:
            preceding[after] -= 1
            if not preceding[after]:
                free.append(after)
    return len(nodes)


def _message(entry: dict[str, Any]) -> bool:
    return entry["kind"] in MESSAGES


def _of(entry: dict[str, Any], group: tuple[int, ...]) -> bool:
    return tuple(entry["group"]) == group


def _size(entry: dict[str, Any]) -> tuple[int, str]:
    return entry["numel"], entry["dtype"]


def _collective(entry: dict[str, Any]) -> tuple[str, int, str]:
    """All-to-all and broadcasts of pickled values may differ in size by rank."""
    numel = 0 if entry["kind"] in ("all_to_all", "broadcast") else entry["numel"]
    return entry["kind"], numel, entry["dtype"]
