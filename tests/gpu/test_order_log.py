"""The judge of orders finds what would hang or mix messages up, and lets pass what would not."""

from typing import Any

from tests.gpu.order_log import differences, stuck

WORLD, PAIR, OTHER = [0, 1, 2, 3], [0, 2], [1, 3]


def op(group: list[int], kind: str = "all_gather", numel: int = 8, peer: int | None = None) -> dict[str, Any]:
    return {"group": group, "kind": kind, "numel": numel, "dtype": "torch.float32", "device": "cpu", "peer": peer}


def test_one_order_everywhere_passes() -> None:
    logs = [[op(WORLD), op(PAIR if rank in PAIR else OTHER), op(WORLD)] for rank in range(4)]
    assert (differences(logs), stuck(logs)) == ([], 0)


def test_overlapping_groups_in_two_orders_are_a_cycle() -> None:
    """As where one rank gathers experts before the rest: each group by itself agrees. A third one waits for them."""
    logs = [[op(WORLD), op(PAIR if rank in PAIR else OTHER)] for rank in range(4)]
    logs[2].reverse()
    assert differences(logs) == []
    assert stuck(logs) == 3


def test_a_cycle_over_three_groups_that_share_single_ranks_is_found() -> None:
    logs = [[op([0, 1]), op([0, 2])], [op([1, 2]), op([0, 1])], [op([0, 2]), op([1, 2])]]
    assert differences(logs) == []
    assert stuck(logs) == 3


def test_other_operations_sizes_and_types_are_differences() -> None:
    for changed in (op(WORLD, "all_reduce"), op(WORLD, numel=9), {**op(WORLD), "dtype": "torch.bfloat16"}):
        logs = [[op(WORLD)], [changed], [op(WORLD)], [op(WORLD)]]
        assert len(differences(logs)) == 1
    assert differences([[op(WORLD)], [], [op(WORLD)], [op(WORLD)]]) == [
        "group [0, 1, 2, 3]: rank 1 differs from rank 0 at operation 0"
    ]
    rows = [[op([0, 1], "all_to_all", numel)] for numel in (3, 5)]
    assert differences(rows) == []


def test_messages_have_a_receiver_and_its_size() -> None:
    sent, got = op([0, 1], "send", 4, 1), op([0, 1], "receive", 4, 0)
    assert differences([[sent], [got]]) == []
    assert len(differences([[sent], []])) == 1
    assert len(differences([[sent], [{**got, "numel": 5}]])) == 1


def test_messages_that_wait_for_each_other_are_a_cycle() -> None:
    """Both send first on one communicator, which carries one after the other; on two communicators they do not wait."""
    group = [0, 1]
    logs = [
        [op(group, "send", peer=1), op(group, "receive", peer=1)],
        [op(group, "send", peer=0), op(group, "receive", peer=0)],
    ]
    assert differences(logs) == []
    assert stuck(logs) == 2
    logs[1].reverse()
    assert stuck(logs) == 0
