"""RankLayout against tables that are dealt out one rank and one row after the other."""

import itertools
from collections.abc import Iterator

import pytest

from mythos_ds.config.layout import ModelChunk, RankLayout, Stage

N_EXPERTS = 24


def _chunk(*, recurrent: bool) -> ModelChunk:
    return ModelChunk((), (0,) if recurrent else (), (), embeds=False, loops=False, predicts=False)


def _layouts(world_size: int) -> Iterator[tuple[list[Stage], int]]:
    """Stages and ep_size of every run of this many ranks: one stage, rings, and three literal stages."""
    shapes = [([world_size // n] * n, [True] * n) for n in range(1, world_size + 1) if world_size % n == 0]
    literal = itertools.product(range(1, world_size), repeat=3)
    shapes += [(list(sizes), [False, True, False]) for sizes in literal if sum(sizes) == world_size]
    for sizes, experts in shapes:
        processes = next(size for size, has in zip(sizes, experts, strict=True) if has)
        for ep_size in (n for n in range(1, processes + 1) if processes % n == 0 and N_EXPERTS % n == 0):
            firsts = itertools.accumulate([0, *sizes[:-1]])
            stages = [
                Stage(_chunk(recurrent=has), first, size, 0)
                for size, has, first in zip(sizes, experts, firsts, strict=True)
            ]
            yield stages, ep_size


CASES = [(world_size, *case) for world_size in range(1, 7) for case in _layouts(world_size)]


def _id(case: tuple[int, list[Stage], int]) -> str:
    _, stages, ep_size = case
    return "-".join(str(stage.size) for stage in stages) + f" ep{ep_size}"


def _places(stages: list[Stage]) -> list[tuple[int, int]]:
    """(stage, place in it) of each rank."""
    return [(index, place) for index, stage in enumerate(stages) for place in range(stage.size)]


@pytest.mark.parametrize(("world_size", "stages", "ep_size"), CASES, ids=map(_id, CASES))
def test_each_rank_has_its_place(world_size: int, stages: list[Stage], ep_size: int) -> None:
    places = _places(stages)
    assert len(places) == world_size
    for rank, (stage, place) in enumerate(places):
        layout = RankLayout.of(stages, ep_size, rank)
        members = [other for other in range(world_size) if places[other][0] == stage]
        assert (layout.world_size, layout.stage, layout.dp_rank) == (world_size, stage, place)
        assert (layout.first_rank, layout.dp_size) == (members[0], len(members))
        assert list(layout.ranks_of(stage)) == list(layout.all_stages[stage]) == members
        assert list(layout.ranks_of(-1)) == [other for other in range(world_size) if places[other][0] == places[-1][0]]
        assert layout.is_last_stage == (stage == len(stages) - 1)
        assert layout.pipelined == (len(stages) > 1)


@pytest.mark.parametrize(("world_size", "stages", "ep_size"), CASES, ids=map(_id, CASES))
def test_experts_are_dealt_to_consecutive_ranks(world_size: int, stages: list[Stage], ep_size: int) -> None:
    places, groups = _places(stages), []
    dealt: dict[int, tuple[int, ...]] = {}
    copy_of: dict[int, int] = {}
    for index, stage in enumerate(stages):
        hand = [rank for rank in range(world_size) if places[rank][0] == index]
        if not stage.part.recurrent:
            dealt |= dict.fromkeys(hand, ())
            continue
        for copy in range(stage.size // ep_size):
            group = [hand.pop(0) for _ in range(ep_size)]
            groups.append(group)
            experts = list(range(N_EXPERTS))
            for rank in group:
                dealt[rank] = tuple(experts.pop(0) for _ in range(N_EXPERTS // ep_size))
                copy_of[rank] = copy
            assert not experts
    same: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for rank in copy_of:
        same.setdefault((places[rank][0], dealt[rank]), []).append(rank)
    for rank in range(world_size):
        layout = RankLayout.of(stages, ep_size, rank)
        assert tuple(layout.expert_range(N_EXPERTS)) == dealt[rank]
        assert [list(ranks) for ranks in layout.all_expert_groups] == groups
        assert [list(ranks) for ranks in layout.all_expert_copies] == list(same.values())
        if rank in copy_of:
            assert (layout.ep_size, layout.expert_copy) == (ep_size, copy_of[rank])
            assert groups[[rank in group for group in groups].index(True)][layout.ep_rank] == rank
            assert list(layout.expert_copies) == same[places[rank][0], dealt[rank]]
        else:
            assert (layout.ep_size, layout.ep_rank) == (1, 0)
        assert layout.expert_stage_size == next(stage.size for stage in stages if stage.part.recurrent)


@pytest.mark.parametrize(("world_size", "stages", "ep_size"), CASES, ids=map(_id, CASES))
def test_rows_are_dealt_in_order_and_meet_their_peers(world_size: int, stages: list[Stage], ep_size: int) -> None:
    micro_batch = 60  # a multiple of every size up to 6
    places = _places(stages)
    owner: dict[tuple[int, int], int] = {}
    for index in range(len(stages)):
        members = [rank for rank in range(world_size) if places[rank][0] == index]
        each = micro_batch // len(members)
        owner |= {(index, row): members[row // each] for row in range(micro_batch)}
    for rank, (stage, _) in enumerate(places):
        layout = RankLayout.of(stages, ep_size, rank)
        own = [row for row in range(micro_batch) if owner[stage, row] == rank]
        assert list(layout.rows_of(micro_batch)) == own
        for other in range(len(stages)):
            found = layout.peers(other, len(own))
            assert [peer for peer, rows in found for _ in rows] == [owner[other, row] for row in own]
            assert [row for _, rows in found for row in rows] == list(range(len(own)))
            assert len({peer for peer, _ in found}) == len(found)
