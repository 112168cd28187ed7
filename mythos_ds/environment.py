"""Which process of how many this is, whatever started it: deepspeed, torchrun, mpirun, srun or plain python.

No torch: the launch script calls this before anything heavy is imported.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mythos_ds.errors import ParallelError
from mythos_ds.ports import LAST_PORT

DEFAULT_MASTER_PORT = 29500
LOOPBACK = "127.0.0.1"
_OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Settings of torch's allocator for GPUs: the name of today, that of older versions, and ROCm's."""


def prefer_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Sets torch's allocator for GPUs so that its segments grow, unless any setting of it is there; before torch is
    imported. The rows of an expert and the loops differ from step to step, and segments of fixed size fragment."""
    if not any(name in environ for name in ALLOCATOR_VARIABLES):
        for name in ALLOCATOR_VARIABLES[:2]:
            environ[name] = "expandable_segments:True"


def wait_passively(environ: MutableMapping[str, str]) -> None:
    """Lets idle threads of torch sleep instead of spin, unless the threads are chosen already; before torch is
    imported. Threads that spin take the cores from those they wait for where other work runs."""
    if not any(name in environ for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"


@dataclass(frozen=True)
class ProcessEnvironment:
    """One process of a run: its ranks, where rank 0 listens, and what started it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> "ProcessEnvironment":
        """Reads the launcher's variables; without any this is the only process, on a free port.

        Errors: ParallelError where the variables contradict each other or name no master for several nodes.
        """
        for belongs, read in _LAUNCHERS:
            if belongs(environ):
                found = read(environ)
                found.check()
                return found
        return cls(0, 1, 0, 1, LOOPBACK, _free_port(), "python")

    def check(self) -> None:
        """Raises ParallelError unless 0 <= rank < world size, 0 <= local rank < local world size <= world size, and the
        port is one."""
        inside = 0 <= self.rank < self.world_size
        inside_node = 0 <= self.local_rank < self.local_world_size <= self.world_size
        if not (inside and inside_node):
            raise ParallelError(
                f"{self.launcher}: given rank {self.rank} of {self.world_size} processes, local rank {self.local_rank} "
                f"of {self.local_world_size}; allowed: 0 <= rank < processes, on each node and in all.",
                code="MDS702",
            )
        if not 0 < self.master_port <= LAST_PORT:
            raise ParallelError(
                f"{self.launcher}: MASTER_PORT: given {self.master_port}; allowed: 1 to {LAST_PORT}; "
                f"nearest: {min(max(self.master_port, 1), LAST_PORT)}",
                code="MDS703",
            )

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Writes the variables that torch.distributed and DeepSpeed read. Open MPI's own local rank goes with them:
        DeepSpeed refuses another."""
        if _OPEN_MPI_LOCAL_RANK in environ:
            environ[_OPEN_MPI_LOCAL_RANK] = str(self.local_rank)
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            LOCAL_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: "gpu[007-012,20],login1" -> "gpu007"."""
    first = re.split(r",(?![^\[]*\])", node_list.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _integer(environ: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The first of `names` that is set, as an int."""
    for name in names:
        text = environ.get(name)
        if text is None or text == "":
            continue
        if not re.fullmatch(r"\d+", text.strip()):
            raise ParallelError(f"environment variable {name}: given {text!r}; allowed: a number >= 0.", code="MDS702")
        return int(text)
    if default is None:
        raise ParallelError(
            f"environment: none of {', '.join(names)} is set, but the launcher's other variables are.", code="MDS702"
        )
    return default


def _master_address(environ: Mapping[str, str], launcher: str, world_size: int, local_world_size: int) -> str:
    given = environ.get("MASTER_ADDR")
    if given:
        return given
    if local_world_size == world_size:
        return LOOPBACK
    raise ParallelError(
        f"{launcher}: {world_size} processes on several nodes, but MASTER_ADDR is not set. "
        "Set it to the host of rank 0 (mpirun: -x MASTER_ADDR=host).",
        code="MDS701",
    )


def _is_torch(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ and "WORLD_SIZE" in environ


def _from_torch(environ: Mapping[str, str]) -> ProcessEnvironment:
    """deepspeed and torchrun write the same names, but deepspeed calls the size of a node LOCAL_SIZE."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK", default=rank)
    local_size = _integer(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size)
    address = _master_address(environ, launcher, world_size, local_size)
    port = _integer(environ, "MASTER_PORT", default=DEFAULT_MASTER_PORT)
    return ProcessEnvironment(rank, world_size, local_rank, local_size, address, port, launcher)


def _is_open_mpi(environ: Mapping[str, str]) -> bool:
    return "OMPI_COMM_WORLD_RANK" in environ


def _from_open_mpi(environ: Mapping[str, str]) -> ProcessEnvironment:
    rank, world_size = _integer(environ, "OMPI_COMM_WORLD_RANK"), _integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_rank = _integer(environ, _OPEN_MPI_LOCAL_RANK, default=rank)
    local_size = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", default=world_size)
    address = _master_address(environ, "mpirun", world_size, local_size)
    port = _integer(environ, "MASTER_PORT", default=DEFAULT_MASTER_PORT)
    return ProcessEnvironment(rank, world_size, local_rank, local_size, address, port, "mpirun")


def _is_pmi(environ: Mapping[str, str]) -> bool:
    return "PMI_RANK" in environ and "PMI_SIZE" in environ


def _from_pmi(environ: Mapping[str, str]) -> ProcessEnvironment:
    """MPICH and Intel MPI. Asked before SLURM: their mpirun may itself use srun, with one task per node."""
    rank, world_size = _integer(environ, "PMI_RANK"), _integer(environ, "PMI_SIZE")
    by_slurm = environ.get("SLURM_PROCID") == str(rank) and environ.get("SLURM_NTASKS") == str(world_size)
    if by_slurm and _is_slurm(environ):
        return _from_slurm(environ)
    local_rank = _integer(environ, "MPI_LOCALRANKID", "PMI_LOCAL_RANK", default=rank)
    local_size = _integer(environ, "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", default=world_size)
    address = _master_address(environ, "mpirun", world_size, local_size)
    port = _integer(environ, "MASTER_PORT", default=DEFAULT_MASTER_PORT)
    return ProcessEnvironment(rank, world_size, local_rank, local_size, address, port, "mpirun")


def _is_slurm(environ: Mapping[str, str]) -> bool:
    """True below srun. A batch script itself also sees SLURM_PROCID and SLURM_NTASKS, but is one process; so is the
    shell of salloc, where that is a step."""
    batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    batch_script = batch_script or environ.get("SLURM_STEP_ID") in _STEPS_OF_ONE
    return "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ and not batch_script


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    rank = _integer(environ, "SLURM_PROCID")
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    local_rank = _integer(environ, "SLURM_LOCALID")
    nodes = _integer(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    local_size = _slurm_tasks_here(environ, world_size, nodes)
    job, step = _integer(environ, "SLURM_JOB_ID", default=0), _integer(environ, "SLURM_STEP_ID", default=0)
    # Every rank derives the same port, and two jobs on one node get different ones.
    port = _integer(environ, "MASTER_PORT", default=20000 + (job + step) % 10000 if job else DEFAULT_MASTER_PORT)
    return ProcessEnvironment(rank, world_size, local_rank, local_size, _slurm_master(environ, nodes), port, "srun")


def _slurm_tasks_here(environ: Mapping[str, str], world_size: int, nodes: int) -> int:
    """Tasks on this node from "SLURM_STEP_TASKS_PER_NODE" such as "8(x3),4", by SLURM_NODEID."""
    pattern = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if pattern is None:
        return -(-world_size // nodes)
    counts = [
        int(tasks) for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", pattern) for _ in range(int(repeats or 1))
    ]
    node = _integer(environ, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else -(-world_size // nodes)


def _slurm_master(environ: Mapping[str, str], nodes: int) -> str:
    given = environ.get("MASTER_ADDR")
    if given or nodes == 1:
        return given or LOOPBACK
    node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = first_host(node_list) if node_list else environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise ParallelError(
            "srun: several nodes, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set.", code="MDS701"
        )
    return address


_STEPS_OF_ONE = (str(2**32 - 6), str(2**32 - 5))
"""Slurm's SLURM_INTERACTIVE_STEP and SLURM_BATCH_SCRIPT."""
_LAUNCHERS = (
    (_is_torch, _from_torch),
    (_is_open_mpi, _from_open_mpi),
    (_is_pmi, _from_pmi),
    (_is_slurm, _from_slurm),
)
