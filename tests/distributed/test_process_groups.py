"""How many process groups are made: as many calls of all ranks on 64 as on 1,024, and none for what does not exist.

The ranks are pretended, one at a time (torch's fake back end), and calls that make groups are counted.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mythos_ds.parallel import process_groups
from tests.helpers.distributed import run_distributed

MOST = 12
RING = ["model.recurrent_layers=24", "model.prelude_layers=4", "model.coda_layers=4"]
TIED = "model.tie_embeddings=true"


def _case(pp_size: str, world_size: int, rank: int, *overrides: str, splits: bool) -> dict[str, Any]:
    # Twice as many micro-batches as there are stages, of a row for each process of one.
    batch = 4 * world_size if pp_size.startswith("[") else 2 * world_size
    settings = [*RING, f"parallel.pp_size={pp_size}", f"training.global_batch_size={batch}", *overrides]
    return {"overrides": settings, "world_size": world_size, "rank": rank, "splits": splits}


SMALL_AND_LARGE = {
    "no pipeline": ("1", 64, 1024),
    "no pipeline, all experts everywhere": ("1", 64, 1024),
    "no pipeline, rows by node": ("1", 64, 1024),
    "ring of two, rows by node": ("2", 64, 1024),
    "ring of two": ("2", 64, 1024),
    "ring of four": ("4", 64, 1024),
    "ring of three, tied": ("3", 96, 1056),
    "literal, tied": ("[16,32,16]", 64, 1024),
}
BY_NODE = ["experts across nodes", "experts of a node"]
CALLS = {
    "no pipeline": ["experts", "expert copies"],
    "no pipeline, all experts everywhere": [],
    "no pipeline, rows by node": ["experts", "expert copies", *BY_NODE],
    "ring of two, rows by node": ["stage", *["messages"] * 4, "experts", "expert copies", *BY_NODE],
    "ring of two": ["stage", *["messages"] * 4, "experts", "expert copies"],
    "ring of four": ["stage", *["messages"] * 4, "experts", "expert copies"],
    "ring of three, tied": ["stage", *["messages"] * 6, "tied embedding", "experts", "expert copies"],
    "literal, tied": ["stage", *["messages"] * 4, "tied embedding", "experts", "expert copies"],
}


def _cases(name: str, splits: bool) -> list[dict[str, Any]]:
    pp_size, small, large = SMALL_AND_LARGE[name]
    overrides = [f"parallel.ep_size={1 if 'everywhere' in name else 16}", *([TIED] if "tied" in name else [])]
    overrides += ["parallel.dispatch=per_node"] if "by node" in name else []
    sizes = {small: pp_size, large: "[256,512,256]" if pp_size.startswith("[") else pp_size}
    return [
        _case(pp, world_size, rank, *overrides, splits=splits)
        for world_size, pp in sizes.items()
        for rank in (0, world_size // 2, world_size - 1)
    ]


@pytest.fixture(scope="module")
def found():
    """What ranks of each layout called, with and without splitting."""
    cases = [case for splits in (True, False) for name in SMALL_AND_LARGE for case in _cases(name, splits)]
    results = iter(run_distributed("tests.distributed.order_cases:created", 1, 300.0, cases=cases)[0])
    return {
        splits: {name: [next(results) for _ in _cases(name, splits)] for name in SMALL_AND_LARGE}
        for splits in (True, False)
    }


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_calls_of_all_ranks_do_not_grow(found, name):
    ranks = found[True][name]
    for one in ranks:
        assert one["together"] == ranks[0]["together"], "every rank takes part in the same calls"
        made = sorted(kind.split(" Channel")[0] for kind, count in one["together"].items() for _ in range(count))
        assert made == sorted(["host", "world of DeepSpeed", *CALLS[name]])
        assert sum(one["together"].values()) <= MOST
        assert one["alone"] == ({"alone": 1} if one["channels"] else {})
        assert one["again"] == 0, "groups are made once"


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_where_nothing_is_split_a_group_is_made_by_its_members(found, name):
    for own, split in zip(found[False][name], found[True][name], strict=True):
        assert own["together"] == {"host": 1}
        kinds = {kind: count for kind, count in split["together"].items() if kind != "host"}
        assert own["alone"] == {**kinds, **split["alone"]}
        assert {**own, "together": 0, "alone": 0} == {**split, "together": 0, "alone": 0}


def test_the_preflight_makes_as_few():
    """It measures the memory of the run's groups: the world twice, stages, experts and expert copies."""
    settings = {"training.micro_batch_size": 1, "parallel.zero_stage": 3, "parallel.ep_size": 16}
    overrides = [*RING, *(f"{key}={value}" for key, value in settings.items())]
    overrides += ["deepspeed.zero_optimization.stage3_param_persistence_threshold=null"]
    cases = [
        _case("2", world_size, 0, *overrides, splits=splits) for world_size in (64, 1024) for splits in (True, False)
    ]
    (found,) = run_distributed("tests.distributed.order_cases:measured", 1, 300.0, cases=cases)
    assert found == [{f"memory {number}": 1 for number in range(5)}] * 4


def test_who_is_in_them(found):
    """Of 1,024 ranks in four stages, rank 512 is the first of stage 2; of 1,056 in three, rank 1,055 the last."""
    inner, stages = found[True]["ring of four"][4], [range(first, first + 256) for first in range(0, 1024, 256)]
    assert inner["stage"] == 2
    assert inner["experts"] == list(range(512, 528))
    assert inner["stage_ranks"] == list(stages[2])
    before, after = [*stages[1], *stages[2]], [*stages[2], *stages[3]]
    assert inner["channels"] == [[True, 0, *after], [True, 1, *before], [False, 0, *after], [False, 1, *before]]
    assert inner["tie"] == []
    last = found[True]["ring of three, tied"][5]
    ends = [*range(352), *range(704, 1056)]
    assert last["tie"] == ends
    assert [True, 2, *ends] in last["channels"]
    middle = found[True]["literal, tied"][4]
    assert (middle["stage"], middle["tie"], len(middle["channels"])) == (1, [], 4)
    assert found[True]["literal, tied"][0]["experts"] == []


@pytest.mark.parametrize(
    ("bound", "supports", "offered", "expected"),
    [
        (torch.device("cuda", 0), True, True, True),
        (torch.device("cuda", 0), False, True, False),
        (torch.device("cuda", 0), True, False, False),
        (None, True, True, False),
    ],
)
def test_when_the_world_is_split(monkeypatch, bound, supports, offered, expected):
    """NCCL with its device known from the start, and a torch that has the function."""
    backend = SimpleNamespace(supports_splitting=supports)
    world = SimpleNamespace(bound_device_id=bound, _get_backend=lambda device: backend)
    functions = {"split_group": print} if offered else {}
    monkeypatch.setattr(
        process_groups, "torch_distributed", SimpleNamespace(group=SimpleNamespace(WORLD=world), **functions)
    )
    assert process_groups.splits() is expected
