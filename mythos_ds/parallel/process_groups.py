"""Making of process groups: one call for all groups of a kind, however many there are. Everything here is collective.

A rank is in exactly one group of each kind, alone in one where it has no part. NCCL, whose communicators all ranks make
together, then splits the world once per kind; elsewhere each rank makes its own group with its members only.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch.distributed as torch_distributed

WORK_TIMEOUT_S = 24 * 3600.0
"""What ranks wait for one that works alone: an index of trillions of tokens and the removal of terabytes on a slow file
system take hours. A process that ends meanwhile ends the wait at once, by its closed connections."""

_ON_THE_HOST = ("gloo", "fake")


@dataclass(frozen=True)
class NodeGroups:
    """The calling rank's part of an expert-parallel group that spans nodes."""

    across: torch_distributed.ProcessGroup
    """The ranks of equal place in their nodes, one of each node."""
    inside: torch_distributed.ProcessGroup
    """The ranks of its node."""


@cache
def own_group(all_ranks: tuple[tuple[int, ...], ...], timeout: timedelta, kind: str) -> torch_distributed.ProcessGroup:
    """The calling rank's of disjoint groups, whose ranks `all_ranks` has; made once. `kind` names them in torch's logs,
    and tells groups of the same ranks apart."""
    held = {rank for ranks in all_ranks for rank in ranks}
    alone = [(rank,) for rank in range(torch_distributed.get_world_size()) if rank not in held]
    # Torch names a group by its ranks and how many groups its process knows: all must know equally many.
    everybody = [list(ranks) for ranks in (*all_ranks, *alone)]
    if splits():
        own = torch_distributed.split_group(split_ranks=everybody, timeout=timeout, group_desc=kind)
        assert own is not None
        return own
    (mine,) = (ranks for ranks in everybody if torch_distributed.get_rank() in ranks)
    return torch_distributed.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=kind)


@cache
def group_of_one() -> torch_distributed.ProcessGroup:
    """The calling rank alone, on the host: for callers that ask for a group and send nothing on one of this size."""
    rank = torch_distributed.get_rank()
    return torch_distributed.new_group(
        [rank], backend=_host_backend(), use_local_synchronization=True, group_desc="alone"
    )


@cache
def host_group() -> torch_distributed.ProcessGroup:
    """All ranks, on the host: for what they agree on. It waits as long as a rank may work alone."""
    return torch_distributed.new_group(
        backend=_host_backend(), timeout=timedelta(seconds=WORK_TIMEOUT_S), group_desc="host"
    )


def forget_groups() -> None:
    """Groups are kept for later calls, but not beyond the process group they belong to."""
    for made in (own_group, group_of_one, host_group):
        made.cache_clear()


def splits() -> bool:
    """Whether the default group makes others by splitting itself: NCCL, where its device was known from the start."""
    world = torch_distributed.group.WORLD
    device = getattr(world, "bound_device_id", None)
    if device is None or not hasattr(torch_distributed, "split_group"):
        return False
    return bool(getattr(world._get_backend(device), "supports_splitting", False))  # type: ignore[union-attr]


def _host_backend() -> str | None:
    """None: that of the world."""
    return None if torch_distributed.get_backend() in _ON_THE_HOST else "gloo"
