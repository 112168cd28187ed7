"""A back end of torch.distributed for tests: messages of device tensors go through host memory and gloo.

NCCL refuses two ranks on one GPU, and gloo lacks operations on CUDA tensors. Here an input is copied to (pinned) host
memory when an operation is issued, gloo carries it, and waiting for the operation copies the result back. CPU tensors
take the same way, through a copy. Each operation is noted in `LOG`, in the order in which this rank issued it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor
from torch.distributed import ProcessGroupGloo, ReduceOp

NAME = "staged"
LOG: "list[Operation]" = []
_Group: Any = torch_distributed.ProcessGroup
_Work: Any = torch_distributed.Work
"""Any: the stubs of torch's versions have other methods, and other signatures."""


@dataclass(frozen=True)
class Operation:
    """One operation as its rank issued it."""

    group: tuple[int, ...]
    """Global ranks."""
    kind: str
    numel: int
    """Of the input; of a receive, of its buffer."""
    dtype: str
    device: str
    peer: int | None = None
    """The other global rank of a send or a receive."""


def take_log() -> list[dict[str, Any]]:
    """What was issued since the last call, as plain values."""
    taken = [asdict(operation) for operation in LOG]
    LOG.clear()
    return taken


def start(store: Path, timeout_s: float) -> None:
    """Start torch.distributed on this back end, as the launcher's variables say; DeepSpeed then takes it as it is.

    store: a file that all ranks reach, and that is not there yet.
    """
    if NAME.upper() not in torch_distributed.Backend._plugins:
        torch_distributed.Backend.register_backend(NAME, _make, devices=["cpu", "cuda"])
    timeout = timedelta(seconds=timeout_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = torch_distributed.FileStore(str(store), size)
    torch_distributed.init_process_group(NAME, store=meeting, rank=rank, world_size=size, timeout=timeout)


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> "StagedGroup":
    return StagedGroup(ProcessGroupGloo(store, rank, size, timeout=timeout), rank, size)


class StagedWork(_Work):
    """An operation under way; waiting for it brings its result to the device."""

    def __init__(self, works: Sequence[Any], bring: Callable[[], None]):
        super().__init__()
        self._works, self._bring, self._done = list(works), bring, False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._done:
            for work in self._works:
                work.wait()
            self._bring()
            self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or all(work.is_completed() for work in self._works)


def staged(tensor: Tensor, *, empty: bool = False) -> Tensor:
    """A copy in host memory, or room for one; pinned for a tensor of a GPU. The copy is whole when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host if empty else host.copy_(tensor.detach())


class StagedGroup(_Group):
    """A process group over gloo. What torch.distributed calls has other names in other versions of torch."""

    def __init__(self, gloo: Any, rank: int, size: int):
        super().__init__(rank, size)
        self._gloo, self._place, self._ranks = gloo, (rank, size), tuple[int, ...]()
        self._together: list[StagedWork] | None = None

    def getBackendName(self) -> str:
        return NAME

    def size(self) -> int:
        return self._place[1]

    def rank(self) -> int:
        return self._place[0]

    @property
    def pg_name(self) -> str:
        return torch_distributed.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    # What carries tensors.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        self._note("all_reduce", tensors[0])
        return self._reduced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self._all(self.allreduce([tensor], opts) for tensor in tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        self._note("reduce", tensors[0])
        totals = [tensor.detach().clone() for tensor in tensors]
        work = self._reduced(totals, opts)
        own = self.rank() == opts.rootRank
        return self._issued([work], lambda: _bring(tensors if own else [], totals if own else []))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        self._note("broadcast", tensors[0])
        hosts = [staged(tensor) for tensor in tensors]
        work = self._gloo.broadcast(hosts, opts)
        return self._issued([work], lambda: _bring(tensors, hosts))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        self._note("all_gather", inputs[0])
        hosts = [[staged(part, empty=True) for part in parts] for parts in outputs]
        work = self._gloo.allgather(hosts, [staged(tensor) for tensor in inputs])
        flat = [part for parts in outputs for part in parts]
        return self._issued([work], lambda: _bring(flat, [host for parts in hosts for host in parts]))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        return self.allgather([list(output.view(-1).chunk(self.size()))], [input.reshape(-1)])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> StagedWork:
        return self._all(self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True))

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        self._note("reduce_scatter", input)
        whole = input.detach().clone()
        work = self._reduced([whole], opts)
        own = whole.view(-1).chunk(self.size())[self.rank()]
        return self._issued([work], lambda: _bring([output], [own.view_as(output)]))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> StagedWork:
        whole = torch.cat([part.reshape(-1) for part in inputs[0]])
        return self.reduce_scatter_single(outputs[0], whole, opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> StagedWork:
        return self._all(self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> StagedWork:
        self._note("all_to_all", input)
        host, given = staged(output, empty=True), staged(input)
        exchange = getattr(self._gloo, "all_to_all_single", None) or self._gloo.alltoall_base
        work = exchange(host, given, list(output_splits), list(input_splits), *([] if opts is None else [opts]))
        return self._issued([work], lambda: _bring([output], [host]))

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StagedWork:
        self._note("send", tensors[0], peer)
        return self._issued([self._gloo.send([staged(tensors[0])], peer, tag)], lambda: None)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StagedWork:
        self._note("receive", tensors[0], peer)
        host = staged(tensors[0], empty=True)
        return self._issued([self._gloo.recv([host], peer, tag)], lambda: _bring(tensors, [host]))

    def barrier(self, opts: Any = None) -> StagedWork:
        self._note("barrier", torch.empty(0))
        return self._issued([self._gloo.barrier()], lambda: None)

    # The names of torch before 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # Coalescing: what is issued in between is waited for together.

    def _start_coalescing(self, device: Any) -> None:
        self._together = []

    def _end_coalescing(self, device: Any) -> StagedWork:
        works, self._together = self._together or [], None
        return self._all(works)

    def _all(self, works: Any) -> StagedWork:
        return StagedWork(list(works), lambda: None)

    def _reduced(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        hosts = [staged(tensor) for tensor in tensors]
        options: Any = torch_distributed.AllreduceOptions()
        operation = ReduceOp.SUM if opts is None else opts.reduceOp
        mean = operation == ReduceOp.AVG  # which gloo lacks
        options.reduceOp = ReduceOp.SUM if mean else operation
        work = self._gloo.allreduce(hosts, options)

        def bring() -> None:
            _bring(tensors, [host / self.size() if mean else host for host in hosts])

        return self._issued([work], bring)

    def _issued(self, works: Sequence[Any], bring: Callable[[], None]) -> StagedWork:
        work = StagedWork(works, bring)
        if self._together is not None:
            self._together.append(work)
        return work

    def _note(self, kind: str, tensor: Tensor, peer: int | None = None) -> None:
        if not self._ranks:
            self._ranks = tuple(torch_distributed.get_process_group_ranks(self))
        other = None if peer is None else self._ranks[peer]
        LOG.append(Operation(self._ranks, kind, tensor.numel(), str(tensor.dtype), tensor.device.type, other))


def _bring(targets: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, host in zip(targets, hosts, strict=True):
            target.copy_(host)
