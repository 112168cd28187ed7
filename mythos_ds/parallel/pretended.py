"""The groups of one rank of a run whose other ranks do not exist: torch's fake back end."""

import os
from typing import Any

import torch.distributed as torch_distributed

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.parallel.groups import ParallelGroups, init_parallel


def pretend(resolved: ResolvedRun, rank: int, gpus_per_node: int) -> ParallelGroups:
    """All groups of the run as `rank` sees them; nothing that it sends arrives anywhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = resolved.world_size
    torch_distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % gpus_per_node, "LOCAL_WORLD_SIZE": gpus_per_node}
    variables = {name: str(value) for name, value in place.items()}
    environment = ProcessEnvironment.detect({**os.environ, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    config = resolved.config
    return init_parallel(
        environment,
        resolved.ep_size,
        resolved.stages,
        tied=config.model.tie_embeddings,
        dispatch=config.parallel.dispatch,
        rows_in_fp8=config.parallel.dispatch_dtype == "fp8",
    )


def ranks_of(group: Any) -> list[int]:
    """The ranks of a process group; none without one."""
    return [] if group is None else list(torch_distributed.get_process_group_ranks(group))
