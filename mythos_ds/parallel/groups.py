"""Start of the process group, and the groups that experts are cut over. Everything here is collective."""

from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as torch_distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError

DEFAULT_TIMEOUT_S = 1800.0

_OPERATIONS = {
    "sum": torch_distributed.ReduceOp.SUM,
    "max": torch_distributed.ReduceOp.MAX,
    "min": torch_distributed.ReduceOp.MIN,
}


@dataclass(frozen=True)
class ParallelGroups:
    """The calling process's place. Data-parallel ranks are all ranks; `ep_size` consecutive ones share the experts."""

    device: torch.device
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    ep_group: torch_distributed.ProcessGroup | None
    """The ranks that together hold all experts; None with ep_size 1."""

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.device.type == "cuda":
            torch_distributed.barrier(device_ids=[self.device.index])
        else:
            torch_distributed.barrier()

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> Tensor:
        """`tensor`, on `device`, reduced in place over all ranks: sum, max or min."""
        torch_distributed.all_reduce(tensor, op=_OPERATIONS[operation])
        return tensor

    def sum(self, values: list[float]) -> list[float]:
        """Numbers added over all ranks in float64."""
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank where `flag` is true on at least one."""
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device), "max").item())

    def close(self) -> None:
        """Ends the process group."""
        deepspeed.comm.destroy_process_group()


def expert_group_name(ep_size: int) -> str:
    """DeepSpeed's key for the groups of one expert-parallel size."""
    return f"ep_size_{ep_size}"


def init_parallel(env: ProcessEnvironment, ep_size: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ParallelGroups:
    """Starts torch.distributed through DeepSpeed (nccl on cuda, else gloo) and creates the expert groups, once.

    A collective that waits longer than `timeout_s` seconds fails. May be called again with another `ep_size`.
    Errors: ParallelError where ep_size does not divide the number of processes.
    """
    if ep_size < 1 or env.world_size % ep_size:
        divisors = [n for n in range(1, env.world_size + 1) if env.world_size % n == 0]
        raise ParallelError(f"parallel.ep_size: given {ep_size}; allowed with {env.world_size} processes: {divisors}.")
    env.export()
    device = _select_device(env)
    _avoid_shared_memory_op()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        auto_mpi_discovery=False,
        verbose=False,
    )
    if ep_size == 1:
        return ParallelGroups(device, env.rank, env.world_size, 0, 1, None)
    _create_expert_groups(ep_size)
    group = require_expert_group(ep_size)
    return ParallelGroups(device, env.rank, env.world_size, env.rank % ep_size, ep_size, group)


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


def _create_expert_groups(ep_size: int) -> None:
    if expert_group_name(ep_size) not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(ep_size, mp_size=1, pp_size=1)


def _select_device(env: ProcessEnvironment) -> torch.device:
    if get_accelerator().device_name() != "cuda":
        return torch.device("cpu")
    present = torch.cuda.device_count()
    if env.local_rank >= present:
        raise ParallelError(f"{env.local_world_size} processes on this node, but {present} GPUs; allowed: one per GPU.")
    torch.cuda.set_device(env.local_rank)
    return torch.device("cuda", env.local_rank)


def _avoid_shared_memory_op() -> None:
    """On CPU DeepSpeed would compile a shared-memory all-reduce at the first start (25 s, needs a compiler)."""
    if get_accelerator().device_name() == "cpu":
        # A dict made on first access; asking the accelerator first spares GPU machines the probe.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
