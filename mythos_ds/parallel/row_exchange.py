"""All-to-all in two halves: rows leave, and are waited for later; in backward their gradients leave where the forward
waited, and are waited for where it let rows leave. What runs between the halves hides the exchange.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_ds.kernels.row_quantisation import dequantise_rows, quantise_rows


@dataclass(frozen=True)
class Nobody:
    """Stands for a group on the meta device, where nobody is and only sizes matter.

    Attributes:
        hop: which of a journey's hops goes over it.
    """

    hop: int = 0


Group = torch_distributed.ProcessGroup | Nobody


@dataclass
class Passage:
    """One exchange: the next send[r] rows go to rank r of the group, which sends receive[r]. in_fp8: rows [n, dim]
    leave in eight bits; their gradients do not."""

    send: list[int]
    receive: list[int]
    group: Group
    in_fp8: bool = False
    _under_way: tuple[Any, Tensor, Tensor] | None = field(default=None, init=False)

    def leave(self, rows: Tensor) -> Tensor:
        """Lets rows [sum(send), ...] leave: [sum(receive), ...], not there until `arrive` is called with it."""
        return _Leave.apply(rows, self)

    def arrive(self, rows: Tensor) -> Tensor:
        """Waits for rows that `leave` returned."""
        return _Arrive.apply(rows, self)

    def exchange(self, rows: Tensor) -> Tensor:
        """Lets rows leave and waits at once: for numbers without gradient."""
        self._start(rows, self.send, self.receive)
        return self._finish()

    def _start(self, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
        rows = rows.contiguous()
        received, work = rows.new_empty(sum(here), *rows.shape[1:]), None
        if not isinstance(self.group, Nobody):
            work = torch_distributed.all_to_all_single(received, rows, here, there, group=self.group, async_op=True)
        # Both must live as long; detached, or a passage that nobody waits for, as a recompute may end before it does,
        # would hold the graph that holds it.
        self._under_way = work, received.detach(), rows.detach()
        return received

    def _finish(self) -> Tensor:
        assert self._under_way is not None
        work, received, _ = self._under_way
        self._under_way = None
        if work is not None:
            work.wait()
        return received


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        if passage.in_fp8:
            passage._start(quantise_rows(rows), passage.send, passage.receive)
            return rows.new_empty(1, 1).expand(sum(passage.receive), rows.shape[1])  # only a shape until they arrive
        return passage._start(rows, passage.send, passage.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.passage._finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, passage: Passage) -> Tensor:
        received = passage._finish()
        ctx.passage = passage
        return dequantise_rows(received, dtype=rows.dtype) if passage.in_fp8 else rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.passage._start(grad, ctx.passage.receive, ctx.passage.send)
        return grad, None  # of the shape that autograd asks for; what comes back is waited for where rows left


@dataclass
class Counts:
    """Numbers that go before the rows: int64 [ranks, ...], a line to each rank of the group and one from each."""

    outgoing: Tensor
    incoming: Tensor
    _work: Any

    @classmethod
    def ask(cls, outgoing: Tensor, group: Group) -> "Counts":
        """Lets the lines leave."""
        incoming, work = torch.empty_like(outgoing), None
        if not isinstance(group, Nobody):
            work = torch_distributed.all_to_all_single(incoming, outgoing, group=group, async_op=True)
        return cls(outgoing, incoming, work)

    def answer(self) -> Tensor:
        """Waits for the lines of the others."""
        if self._work is not None:
            self._work.wait()
        return self.incoming
