"""Start of the process group, and the groups that experts are cut over. Everything here is collective."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_comm import new_exchange_scope
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from mythos_ds.config.dispatch import LOCAL, DispatchChoice, choose_dispatch
from mythos_ds.config.layout import RankLayout, Stage
from mythos_ds.costs.schedule import Channel, channel_edges
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.log import get_logger
from mythos_ds.parallel.process_groups import (
    WORK_TIMEOUT_S,
    NodeGroups,
    forget_groups,
    group_of_one,
    host_group,
    own_group,
)
from mythos_ds.parallel.rendezvous import (
    allow_connections,
    claim_device,
    first_line,
    host_network_problem,
    in_time,
    meet,
    name_interface,
)

DEFAULT_TIMEOUT_S = 1800.0

_logger = get_logger(__name__)

_OPERATIONS = {
    "sum": torch_distributed.ReduceOp.SUM,
    "max": torch_distributed.ReduceOp.MAX,
    "min": torch_distributed.ReduceOp.MIN,
}


@dataclass(frozen=True)
class ParallelGroups:
    """The calling process's place, and the process groups that it is in."""

    device: torch.device
    layout: RankLayout
    ep_group: torch_distributed.ProcessGroup | None
    """The ranks that together hold all experts of a layer; None with ep_size 1, or where the stage has no experts."""
    host_group: torch_distributed.ProcessGroup
    """All ranks, by the host's network: what they agree on does not pass through the device."""
    timeout_s: float
    """How long a collective waits that all ranks come to alike."""
    dp_group: torch_distributed.ProcessGroup | None = None
    """The ranks of the stage; None (all) without pipeline."""
    tie_group: torch_distributed.ProcessGroup | None = None
    """The ranks of the first and the last stage where both hold a tied embedding; None elsewhere."""
    channels: Mapping[Channel, torch_distributed.ProcessGroup] = field(default_factory=dict)
    """What each of the pipeline's messages travels on; none without pipeline."""
    mpu: "StageTopology | None" = None
    """What confines DeepSpeed to the stage; None without pipeline."""
    dispatch: DispatchChoice = DispatchChoice(LOCAL)
    """What carries rows to experts."""
    rows_in_fp8: bool = False
    """Whether they travel there in eight bits."""
    node_groups: NodeGroups | None = None
    """Where that goes by node; None elsewhere."""
    exchange_scope: int = field(default_factory=new_exchange_scope)
    """Whose layers share a buffer of DeepEP: DeepSpeed's number."""

    @property
    def rank(self) -> int:
        """The process's rank among all."""
        return self.layout.rank

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.layout.world_size

    @property
    def pipelined(self) -> bool:
        """Whether there is more than one stage."""
        return self.layout.pipelined

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.agree([0.0], "max")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor`, on `device`, added up in place over all ranks."""
        torch_distributed.all_reduce(tensor)
        return tensor

    def agree(self, values: list[float], operation: str, *, patient: bool = False) -> list[float]:
        """Numbers of the host reduced over all ranks in float64: sum, max or min; by the host's network.

        patient: wait as long as a rank may work alone (WORK_TIMEOUT_S), not only `timeout_s`.
        """
        reduced = torch.tensor(values, dtype=torch.float64)
        work = torch_distributed.all_reduce(reduced, _OPERATIONS[operation], self.host_group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=WORK_TIMEOUT_S if patient else self.timeout_s))
        return reduced.tolist()

    def sum(self, values: list[float]) -> list[float]:
        """Numbers of the host added over all ranks."""
        return self.agree(values, "sum")

    def max(self, value: float) -> float:
        """The largest of all ranks' numbers."""
        return self.agree([value], "max")[0]

    def any(self, flag: bool) -> bool:
        """True on every rank where `flag` is true on at least one."""
        return bool(self.max(float(flag)))

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value, which must be plain, on every rank. Patient: rank 0 may have worked for it."""
        held = [value]
        torch_distributed.broadcast_object_list(held, src=0, group=self.host_group)
        return held[0]

    def close(self) -> None:
        """Ends the process group."""
        deepspeed.comm.destroy_process_group()
        forget_groups()


class StageTopology:
    """The `mpu` that DeepSpeed asks for its groups: data parallelism is the stage, model parallelism is off.

    Its model-parallel rank must stay 0: DeepSpeed leaves other ranks out of the gradient norm.
    """

    def __init__(self, stage: torch_distributed.ProcessGroup, alone: torch_distributed.ProcessGroup):
        self._stage, self._alone = stage, alone

    def get_data_parallel_group(self) -> torch_distributed.ProcessGroup:
        return self._stage

    def get_data_parallel_rank(self) -> int:
        return torch_distributed.get_rank(self._stage)

    def get_data_parallel_world_size(self) -> int:
        return torch_distributed.get_world_size(self._stage)

    def get_model_parallel_group(self) -> torch_distributed.ProcessGroup:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def expert_group_name(ep_size: int) -> str:
    """DeepSpeed's key for the groups of one expert-parallel size."""
    return f"ep_size_{ep_size}"


def init_parallel(
    env: ProcessEnvironment,
    ep_size: int,
    stages: Sequence[Stage] | None = None,
    *,
    tied: bool = False,
    dispatch: str = "all_to_all",
    rows_in_fp8: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ParallelGroups:
    """Starts torch.distributed through DeepSpeed (nccl on cuda, else gloo) and creates all groups, once.

    stages: the pipeline's (None: no pipeline). tied: whether its first and its last stage share an embedding. dispatch:
    `parallel.dispatch`, by node where nodes have env.local_world_size consecutive ranks. rows_in_fp8: on their way to
    experts. A collective that waits longer than `timeout_s` seconds fails. May be called again for another layout.
    Errors: ParallelError where ep_size does not divide the processes of a stage with experts, the stages are not those
    of all processes, or experts are to be reached by node and their groups do not hold several whole nodes.
    """
    layout = RankLayout(env.rank, (env.world_size,), run_ep_size=ep_size)
    if stages:
        layout = RankLayout.of(stages, ep_size, env.rank)
    _check_sizes(env, layout)
    device = select_device(env)
    choice = choose_dispatch(dispatch, ep_size, env.local_world_size, device.type)
    _check_nodes(choice, layout, env.local_world_size)
    _avoid_shared_memory_op()
    timeout = timedelta(seconds=timeout_s)
    _start(env, device, timeout)
    if deepspeed_groups._WORLD_GROUP is None:
        # DeepSpeed would make this copy of the world itself, and its collectives would wait torch's 30 minutes.
        deepspeed_groups._WORLD_GROUP = own_group((tuple(range(env.world_size)),), timeout, "world of DeepSpeed")
    host = in_time(host_group, timeout_s)  # gloo's own limit on connecting is that on waiting for one that works alone
    if isinstance(host, Exception):
        raise host_network_problem(env, host) from None
    groups = ParallelGroups(device, layout, None, host, timeout_s, dispatch=choice, rows_in_fp8=rows_in_fp8)
    if groups.pipelined:
        groups = _with_stages(groups, timeout, tied=tied)
    if ep_size > 1:
        experts = _expert_groups(layout, timeout)
        _register(experts, ep_size)
        groups = replace(groups, ep_group=experts.ep)
    if choice.name == "per_node":
        groups = replace(groups, node_groups=_node_groups(layout, env.local_world_size, timeout))
    if choice.why and env.rank == 0:
        _logger.info("dispatch: %s (%s)", choice.name, choice.why)
    # Ranks make only the groups that they are in: one that ended now would take the others' meeting place with it.
    groups.barrier()
    return groups


def _with_stages(groups: ParallelGroups, timeout: timedelta, *, tied: bool) -> ParallelGroups:
    """With the groups of a pipeline: the calling rank's stage, what its messages travel on, and the first stage with
    the last where these share an embedding. Collective."""
    layout = groups.layout
    stages = tuple(tuple(ranks) for ranks in layout.all_stages)
    own = own_group(stages, timeout, "stage")
    channels = {}
    for channel, edges in channel_edges(len(stages), ring=layout.ring).items():
        pairs = tuple(tuple(sorted(stages[first] + stages[second])) for first, second in edges)
        group = own_group(pairs, timeout, f"messages {channel}")
        if any(layout.stage in edge for edge in edges):
            channels[channel] = group
    tie = own_group(((*stages[0], *stages[-1]),), timeout, "tied embedding") if tied else None
    holds_embedding = layout.stage == 0 or layout.is_last_stage
    return replace(
        groups,
        dp_group=own,
        channels=channels,
        tie_group=tie if holds_embedding else None,
        mpu=StageTopology(own, group_of_one()),
    )


def _start(env: ProcessEnvironment, device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed, unless it runs already. Raises ParallelError where the processes do not meet, or several
    share a device."""
    store, backend = None, "nccl" if device.type == "cuda" else "gloo"
    if not torch_distributed.is_initialized():
        allow_connections(env.world_size)
        env, store = meet(env, timeout.total_seconds())
        if store is not None and backend == "nccl":
            claim_device(env, store, device)
        name_interface(env)
    # DeepSpeed takes the device of this number.
    replace(env, local_rank=env.local_rank if device.index is None else device.index).export()
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            timeout=timeout,
            auto_mpi_discovery=False,
            verbose=False,
        )
    except (torch_distributed.DistNetworkError, torch_distributed.DistStoreError) as error:
        raise ParallelError(
            f"rank {env.rank} of {env.world_size}: no process group at {env.master_addr}:{env.master_port} within "
            f"{timeout.total_seconds():.0f} s ({first_line(error)})",
            code="MDS708",
        ) from None
    del store  # its server is torch's own from here


def require_expert_group(ep_size: int) -> torch_distributed.ProcessGroup:
    """The calling rank's expert-parallel group. Never creates one: creation is collective and belongs to start-up."""
    group = deepspeed_groups._get_expert_parallel_group_dict().get(expert_group_name(ep_size))
    if group is None:
        raise ParallelError(
            f"expert groups of size {ep_size} do not exist; call init_parallel before building the model."
        )
    return group


def require_expert_data_group(ep_size: int) -> torch_distributed.ProcessGroup:
    """The ranks that hold the same experts as the calling rank: ZeRO cuts expert weights over them."""
    require_expert_group(ep_size)
    return deepspeed_groups._get_expert_data_parallel_group(expert_group_name(ep_size))


def _check_nodes(choice: DispatchChoice, layout: RankLayout, ranks_per_node: int) -> None:
    """Rows go to whole nodes, of which a group of experts has several: consecutive ranks from a node's first one on."""
    if choice.name != "per_node":
        return
    size, starts = layout.run_ep_size, [group.start for group in layout.all_expert_groups]
    whole = ranks_per_node > 1 and size % ranks_per_node == 0 and not any(s % ranks_per_node for s in starts)
    if not whole or size == ranks_per_node:
        raise ParallelError(
            f'parallel.dispatch: given "per_node" with expert groups of {size} and {ranks_per_node} processes on this '
            'node; allowed: groups of two whole nodes or more, of several processes each; nearest: "per_rank".',
            code="MDS281",
        )


def _node_groups(layout: RankLayout, ranks_per_node: int, timeout: timedelta) -> NodeGroups | None:
    """The calling rank's; None where its stage has no experts. Collective."""
    kinds = (
        ("experts across nodes", layout.experts_across_nodes(ranks_per_node)),
        ("experts of a node", layout.expert_nodes(ranks_per_node)),
    )
    across, inside = (own_group(tuple(map(tuple, groups)), timeout, kind) for kind, groups in kinds)
    return NodeGroups(across, inside) if layout.stage in layout.expert_stages else None


@dataclass(frozen=True)
class _ExpertGroups:
    """Those of the calling rank; None where its stage has no experts."""

    ep: torch_distributed.ProcessGroup | None
    ep_ranks: tuple[int, ...]
    edp: torch_distributed.ProcessGroup | None
    edp_ranks: tuple[int, ...]


def _check_sizes(env: ProcessEnvironment, layout: RankLayout) -> None:
    sizes, ep_size = layout.stage_sizes, layout.run_ep_size
    if layout.world_size != env.world_size:
        raise ParallelError(f"pipeline stages of {list(sizes)} processes, but there are {env.world_size} in all.")
    processes = math.gcd(*(sizes[i] for i in layout.expert_stages))
    if ep_size < 1 or processes % ep_size:
        divisors = [n for n in range(1, processes + 1) if processes % n == 0]
        raise ParallelError(f"parallel.ep_size: given {ep_size}; allowed with {processes} processes: {divisors}.")


def _expert_groups(layout: RankLayout, timeout: timedelta) -> _ExpertGroups:
    """The calling rank's of the groups that share experts, and of those that hold the same. Collective."""
    made: list[Any] = []
    for kind, groups in (("experts", layout.all_expert_groups), ("expert copies", layout.all_expert_copies)):
        group = own_group(tuple(tuple(ranks) for ranks in groups), timeout, kind)
        own = next((tuple(ranks) for ranks in groups if layout.rank in ranks), ())
        made += [group if own else None, own]
    return _ExpertGroups(*made)


def _register(groups: _ExpertGroups, ep_size: int) -> None:
    """Writes the groups where DeepSpeed looks them up by name.

    Its own function for this, `_create_expert_and_data_parallel`, knows stages of equal size only and keeps the groups
    of a former layout.
    """
    name = expert_group_name(ep_size)
    for registry, value in (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP, groups.ep),
        (deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, groups.ep_ranks),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, groups.edp),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, groups.edp_ranks),
    ):
        registry.pop(name, None)
        if value:
            registry[name] = value


def select_device(env: ProcessEnvironment) -> torch.device:
    """The launcher's device for this process; where it shows each process one GPU, that one. Raises ParallelError where
    a GPU is missing."""
    if get_accelerator().device_name() != "cuda":
        return torch.device("cpu")
    present = torch.cuda.device_count()
    # Slurm's --gpus-per-task, or a container for each process.
    index = 0 if present == 1 else env.local_rank
    if index >= present:
        raise ParallelError(
            f"{env.local_world_size} processes on this node, but {present} GPUs; allowed: one per GPU.", code="MDS707"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _avoid_shared_memory_op() -> None:
    """On CPU DeepSpeed would compile a shared-memory all-reduce at the first start (25 s, needs a compiler)."""
    if get_accelerator().device_name() == "cpu":
        # A dict made on first access; asking the accelerator first spares GPU machines the probe.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
