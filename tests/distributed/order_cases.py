"""What runs inside the processes of test_order.py."""

import contextlib
import os
import random
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as torch_distributed
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from mythos_ds.cluster.preflight.devices import memory_outside
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.engine import build
from mythos_ds.engine.deepspeed_patches import require_same_numbers
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.parallel import process_groups
from mythos_ds.parallel.collective import on_rank_zero
from mythos_ds.parallel.groups import init_parallel
from mythos_ds.parallel.pipeline_executor import _Run
from mythos_ds.parallel.pretended import pretend, ranks_of
from tests.distributed.cases import opened, own_batches
from tests.distributed.communication_cases import LARGE_MODEL
from tests.helpers.referee import GATHERS, Event, Referee, refereed

GATHER = "_PartitionedParameterCoordinator__all_gather_params"
EXPERTS = {"ep": 2, "stage": 3, "accumulation": 1, "deepspeed": LARGE_MODEL}
"""On four ranks: experts on two, in two copies, so that weights are gathered over four ranks and over two."""


def logs(cases: list[dict[str, Any]]) -> list[list[Event]]:
    """The notes of two optimizer steps of different depth and an evaluation, of each case."""
    with refereed() as referee:
        return [_log(case, referee) for case in cases]


def _log(case: dict[str, Any], referee: Referee) -> list[Event]:
    referee.take()
    with opened(case) as (engine, groups):
        for step, n_loops in enumerate((3, 2)):
            batches = own_batches(step, case.get("accumulation", 2), groups)
            engine.train_step(batches, n_loops=n_loops, n_grad_loops=2, lr=1e-3)
        engine.eval_loss(batches, 2)
    return referee.take()


def gathers_in_another_order() -> list[Event]:
    """The notes of a run in which rank 2 gathers in another order than the others."""
    ordered = getattr(PartitionedParameterCoordinator, GATHER)

    def experts_first(self: PartitionedParameterCoordinator, params: set[nn.Parameter], forward: bool) -> None:
        ordered.__wrapped__(self, sorted(params, key=lambda each: getattr(each, "allreduce", True)), forward)

    changed = experts_first if torch_distributed.get_rank() == 2 else ordered
    with patch.object(build, "order_gathers"), patch.object(PartitionedParameterCoordinator, GATHER, changed):
        return logs([EXPERTS])[0]


def messages_on_one_communicator() -> list[Event]:
    """The notes of a ring all of whose messages share the group of all ranks."""
    with patch.object(_Run, "_channel", lambda *_: torch_distributed.group.WORLD):
        return logs([{"ep": 2, "stage": 3, "pp": 2}])[0]


def everything(plain: list[dict[str, Any]], pipelines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tests of four ranks read, in one launch. Runs without pipeline come first: DeepSpeed numbers modules per
    process, and compares the numbers over all ranks there."""
    return {
        "plain": logs(plain),
        "starts": gather_orders(10, 40),
        "gathers": gathers_in_another_order(),
        "pipelines": logs(pipelines),
        "messages": messages_on_one_communicator(),
    }


def gather_orders(starts: int, most: int) -> dict[str, Any]:
    """Sizes of the groups that weights are gathered over, in order, of `starts` starts; and without the order, of as
    many starts as it takes until ranks differ, at most `most`."""
    return {"ordered": [_start(number) for number in range(starts)], "left alone": _unordered(most)}


def _unordered(most: int) -> list[list[int]]:
    ordered = getattr(PartitionedParameterCoordinator, GATHER)
    own: list[list[int]] = []
    with (
        patch.object(build, "order_gathers"),
        patch.object(PartitionedParameterCoordinator, GATHER, ordered.__wrapped__),
    ):
        for number in range(most):
            own.append(_start(number))
            everybody: list[list[int]] = [[] for _ in range(torch_distributed.get_world_size())]
            torch_distributed.all_gather_object(everybody, own[-1])
            if any(order != everybody[0] for order in everybody):
                break
    return own


def _start(number: int) -> list[int]:
    """One start on this rank, after objects of drawn number and size have come and gone: the order of its gathers."""
    draw = random.Random(1000 * torch_distributed.get_rank() + number)
    kept: list[Any] = [nn.Parameter(torch.empty(draw.randrange(1, 300))) for _ in range(draw.randrange(400))]
    kept = [each for each in kept if draw.random() < 0.5] + [bytearray(draw.randrange(9_000)) for _ in range(200)]
    with refereed() as referee, opened(EXPERTS) as (engine, groups):
        referee.take()
        engine.train_step(own_batches(0, 1, groups), n_loops=1, n_grad_loops=1, lr=1e-3)
    del kept
    return [len(event["ranks"]) for event in referee.take() if event.get("op", "").startswith(GATHERS)]


class Creations:
    """Counts the calls that make process groups, with a world that does, or does not, split itself as NCCL's does."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.together: Counter[str] = Counter()
        """Calls that all ranks take part in."""
        self.alone: Counter[str] = Counter()
        """Calls of a group's own members."""
        self._new_group = torch_distributed.new_group

    @contextlib.contextmanager
    def counting(self, splits: bool):
        """Stand in for torch's functions meanwhile."""
        functions = {"new_group": self.new_group, "split_group": self.split_group}
        with contextlib.ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(patch.object(torch_distributed, name, function))
            stack.enter_context(patch.object(process_groups, "splits", lambda: splits))
            yield self

    def new_group(self, ranks: list[int] | None = None, **options: Any) -> Any:
        """Torch's, counted."""
        own = options.get("use_local_synchronization", False)
        (self.alone if own else self.together)[options["group_desc"]] += 1
        assert not own or torch_distributed.get_rank() in (ranks or ())
        return self._new_group(ranks, **options)

    def split_group(self, *, split_ranks: list[list[int]], timeout: timedelta, group_desc: str) -> Any:
        """The calling rank's part, made by itself."""
        assert sorted(rank for ranks in split_ranks for rank in ranks) == list(range(self.world_size))
        self.together[group_desc] += 1
        (own,) = (ranks for ranks in split_ranks if torch_distributed.get_rank() in ranks)
        return self._new_group(own, timeout=timeout, use_local_synchronization=True)


def created(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one rank of a large world calls to make its groups, and who is in them."""
    with patch.dict(os.environ):  # a pretended rank writes its own place there
        return [_created(**case) for case in cases]


def _created(overrides: list[str], world_size: int, rank: int, splits: bool) -> dict[str, Any]:
    settings = ["model.n_experts=64", "training.micro_batch_size=1", "parallel.zero_stage=3", *overrides]
    settings += ["deepspeed.zero_optimization.stage3_param_persistence_threshold=null"]
    resolved = resolve(load_config("tiny.json", settings).config, world_size)
    with Creations(world_size).counting(splits) as counted:
        groups = pretend(resolved, rank, 8)
        again = pretend_again(resolved)
    found = {
        "together": dict(counted.together),
        "alone": dict(counted.alone),
        "again": again,
        "stage": groups.layout.stage,
        "experts": ranks_of(groups.ep_group),
        "stage_ranks": ranks_of(groups.dp_group),
        "tie": ranks_of(groups.tie_group),
        "channels": [[*channel, *ranks_of(group)] for channel, group in groups.channels.items()],
    }
    groups.close()
    return found


def measured(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What one rank of a large world calls in the preflight to measure memory outside of the allocator."""
    with patch.dict(os.environ):
        return [_measured(**case) for case in cases]


def _measured(overrides: list[str], world_size: int, rank: int, splits: bool) -> dict[str, int]:
    resolved = resolve(load_config("tiny.json", ["model.n_experts=64", *overrides]).config, world_size)
    groups = pretend(resolved, rank, 8)
    with Creations(world_size).counting(splits) as counted:
        memory_outside(groups.layout, torch.device("cpu"), 5.0)
    groups.close()
    assert not (counted.alone if splits else counted.together)
    return dict(counted.together + counted.alone)


def pretend_again(resolved: Any) -> int:
    """Groups that a second call makes."""
    with Creations(resolved.world_size).counting(False) as counted:
        environment = ProcessEnvironment.detect(os.environ)
        init_parallel(environment, resolved.ep_size, resolved.stages, tied=resolved.config.model.tie_embeddings)
    return sum(counted.together.values()) + sum(counted.alone.values())


def agreements(limit_s: float) -> dict[str, Any]:
    """Ranks agree while one works alone for longer than collectives may wait, without touching the device; ordinary
    agreements do not wait so long."""
    groups = init_parallel(ProcessEnvironment.detect(os.environ), 1, timeout_s=limit_s)
    nowhere = replace(groups, device=torch.device("meta"))
    started = time.monotonic()
    on_rank_zero(nowhere, lambda: time.sleep(1.5 * limit_s))
    found: dict[str, Any] = {"worked": time.monotonic() - started}
    found |= {"any": nowhere.any(groups.rank == 1), "none": nowhere.any(False), "max": nowhere.max(groups.rank)}
    found |= {"sum": nowhere.sum([0.1, groups.rank]), "from": nowhere.from_rank_zero([groups.rank, "text"])}
    nowhere.barrier()
    if groups.rank == 0:
        time.sleep(1.5 * limit_s)
        return found
    started = time.monotonic()
    try:
        nowhere.any(False)
    except RuntimeError as error:
        found |= {"error": str(error), "waited": time.monotonic() - started}
    return found


def numbered_apart() -> str:
    """What is said where rank 1 makes its weights in another order."""
    with opened({"ep": 1, "stage": 3}) as (engine, groups):
        require_same_numbers(engine.module, groups)
        weights = list(engine.module.parameters())
        if groups.rank == 1:
            vars(weights[0])["ds_id"], vars(weights[1])["ds_id"] = (
                vars(weights[1])["ds_id"],
                vars(weights[0])["ds_id"],
            )
        try:
            require_same_numbers(engine.module, groups)
        except ParallelError as error:
            return str(error)
    return ""


def two_ranks(limit_s: float) -> dict[str, Any]:
    """What the tests of two ranks read, in one launch; the last ends what it waits for."""
    return {"apart": numbered_apart(), "agreed": agreements(limit_s)}
