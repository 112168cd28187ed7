"""Memory that a process takes on its GPU outside of torch's allocator: CUDA's context, and NCCL's communicators.

By formula from the groups of a run; every number of it is an assumption, to be replaced by what `mythos-ds preflight`
measures (`cluster.context_bytes`). No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.reach import GPUS_PER_NODE, planned_dispatch

CUDA_CONTEXT_BYTES = 0.5e9
"""The context and the kernels that are loaded (assumption)."""
NODE_BYTES, NETWORK_BYTES = 0.2e9, 0.6e9
"""Buffers of a communicator whose ranks share a node, and of one that spans nodes (assumption: 0.2 to 0.6 GB each)."""
PEER_BYTES = 4e6
"""Buffers of a connection that an all-to-all or a message opens to a rank, both directions (assumption)."""
_RING_CHANNELS = 4
"""Communicators of a pipeline that send and receive only: by direction and parity of the stage."""


@dataclass(frozen=True)
class Communicator:
    """A group that a process speaks in: its ranks, over how many nodes, and how many of them by direct messages."""

    name: str
    size: int
    nodes: int
    peers: int = 0
    rings: bool = True
    """Whether there are collectives beside messages, which build rings and trees."""

    @property
    def bytes(self) -> float:
        """Its buffers on the process's GPU; none where the process is alone."""
        if self.size == 1:
            return 0.0
        buffers = (NETWORK_BYTES if self.nodes > 1 else NODE_BYTES) if self.rings else 0.0
        return buffers + self.peers * PEER_BYTES


def communicators(resolved: ResolvedRun, index: int = 0) -> tuple[Communicator, ...]:
    """The groups of a process of pipeline stage `index`."""
    stage = resolved.stages[index]
    layout = resolved.layout(stage.first_rank)
    cluster = resolved.config.cluster
    per_node = cluster.gpus_per_node if cluster is not None else GPUS_PER_NODE

    def made(name: str, ranks: Sequence[int], peers: int = 0) -> Communicator:
        return Communicator(name, len(ranks), len({rank // per_node for rank in ranks}), peers)

    everyone = range(resolved.world_size)
    found = [made("all processes", everyone), made("DeepSpeed's copy of it", everyone)]
    if layout.pipelined:
        found.append(made("pipeline stage", layout.ranks_of(index)))
        found += [Communicator("ring", resolved.world_size, 1, 1, rings=False)] * _RING_CHANNELS
        ends = (0, len(resolved.stages) - 1)
        if resolved.config.model.tie_embeddings and index in ends:
            found.append(made("tied embedding", [rank for end in ends for rank in layout.ranks_of(end)]))
    if layout.ep_size > 1:
        sharing = layout.ranks_of(index)[: layout.ep_size]
        found += [made("experts", sharing, len(sharing) - 1), made("copies of experts", layout.expert_copies)]
        if planned_dispatch(resolved).name == "per_node":
            across, inside = sharing[::per_node], sharing[:per_node]
            found += [made("experts across nodes", across, len(across) - 1)]
            found += [made("experts of a node", inside, len(inside) - 1)]
    return tuple(found)


def outside_bytes(resolved: ResolvedRun) -> float:
    """Context and communicators of the process that has most; what was measured, where the configuration says it."""
    cluster = resolved.config.cluster
    if cluster is not None and cluster.context_bytes is not None:
        return float(cluster.context_bytes)
    most = max(
        sum(communicator.bytes for communicator in communicators(resolved, index))
        for index in range(len(resolved.stages))
    )
    return CUDA_CONTEXT_BYTES + most
