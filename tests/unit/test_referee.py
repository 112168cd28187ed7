"""The referee on notes written by hand: what NCCL would carry out, and what it would not."""

from typing import Any

from tests.helpers.referee import RECEIVED, SENT, Event, mixed_roles, problems


def collective(group: str, ranks: list[int], op: str = "allreduce", size: int = 4) -> Event:
    """A collective's note."""
    return {"group": group, "ranks": ranks, "op": op, "shapes": [[size]], "dtypes": ["torch.float32"]}


def message(op: str, peer: int, number: int, group: str = "ring", size: int = 4) -> Event:
    """A message's note."""
    return {**collective(group, [0, 1], op, size), "peer": peer, "number": number}


def waited(number: int) -> Event:
    """The note of a wait."""
    return {"waited": number}


WORLD: list[Any] = [0, 1, 2, 3]


def test_one_order_of_overlapping_groups() -> None:
    """Groups {0, 1, 2, 3} and {0, 2}, {1, 3}: whatever the order, if it is the same on all ranks."""
    pairs = [[0, 2], [1, 3], [0, 2], [1, 3]]
    first = [[collective("world", WORLD), collective(str(pair), pair)] for pair in pairs]
    assert problems(first) == []
    assert problems([log[::-1] for log in first]) == []
    other = [log[::-1] if rank == 2 else log for rank, log in enumerate(first)]
    (problem,) = problems(other)
    assert "wait for each other" in problem
    assert "rank 2 at" in problem


def test_one_sequence_within_a_group() -> None:
    logs = [[collective("world", [0, 1]), collective("world", [0, 1], "broadcast")] for _ in range(2)]
    assert problems(logs) == []
    (problem,) = problems([logs[0], logs[1][::-1]])
    assert "call 0: rank 0 ('allreduce'" in problem
    assert problems([logs[0], logs[1][:1]])
    shapes = [[collective("world", [0, 1], size=4)], [collective("world", [0, 1], size=5)]]
    assert problems(shapes)
    assert problems([[{**log[0], "op": "alltoall_base"}] for log in shapes]) == [], "rows may be uneven"


def test_messages_wait_for_both_ends() -> None:
    """Both send, then receive: on one communicator each waits for the other's receive, which stands behind its send."""
    both = [[message(SENT, 1 - rank, 1), message(RECEIVED, 1 - rank, 2), waited(2), waited(1)] for rank in range(2)]
    (problem,) = problems(both)
    assert "wait for each other" in problem
    apart = [
        [
            message(SENT, 1 - rank, 1, f"from {rank}"),
            message(RECEIVED, 1 - rank, 2, f"from {1 - rank}"),
            waited(2),
            waited(1),
        ]
        for rank in range(2)
    ]
    assert problems(apart) == []
    assert len(mixed_roles(both)) == 2
    assert mixed_roles(apart) == []


def test_a_message_that_is_given_is_not_yet_waited_for() -> None:
    """The sender goes on to a collective; the receiver takes the message after it."""
    sender = [message(SENT, 1, 1), collective("world", [0, 1]), waited(1)]
    receiver = [collective("world", [0, 1]), message(RECEIVED, 0, 1), waited(1)]
    assert problems([sender, receiver]) == []
    blocking = [sender[0], sender[2], sender[1]]
    assert problems([blocking, receiver])


def test_messages_are_of_one_size() -> None:
    (problem,) = problems([[message(SENT, 1, 1)], [message(RECEIVED, 0, 1, size=5)]])
    assert "sent" in problem
