"""The order in which a loop computes, lets rows leave and waits for them, its backward and what is computed again
included, recorded from the model's own code on the meta device, with lanes where the run has them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mythos_ds.config.layout import ModelChunk
from mythos_ds.kernels import attention
from mythos_ds.kernels.regions import regions_called_by
from mythos_ds.parallel.row_exchange import Nobody, Passage
from mythos_ds.plan.activation_trace import FusedAttention, Workload, one_device, piece
from mythos_ds.plan.moved_bytes import PRODUCTS, MovedBytes

SAMPLE_TOKENS = 2048
"""Tokens of a loop that is recorded."""
_GROUPED = "aten::_grouped_mm"


@dataclass(frozen=True)
class Work:
    """What is computed between two events of an exchange.

    Attributes:
        expert_flops: of grouped products.
        other_flops: of other products.
        attention_rows: a row for each token and head of an attention, thrice where its backward is in it.
        bytes: moved by operations beside products and attention.
        launches: of all operations.
    """

    expert_flops: float = 0.0
    other_flops: float = 0.0
    attention_rows: float = 0.0
    bytes: float = 0.0
    launches: int = 0


@dataclass(frozen=True)
class Leave:
    """Rows leave over a hop: bytes handed to its all-to-all."""

    number: int
    hop: int
    bytes: float


@dataclass(frozen=True)
class Wait:
    """The rows of `Leave` with this number are needed."""

    number: int


Event = Work | Leave | Wait


class _Recorder(MovedBytes):
    """Cuts what is counted into the events of exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._expert_flops = self._other_flops = self._attention_rows = 0.0
        self._before = 0, 0
        self._under_way: dict[int, int] = {}
        self._started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in PRODUCTS or name == "aten::addmm":
            a, b = args[1:3] if name in ("aten::addmm", "aten::baddbmm") else args[:2]
            flops = 2.0 * a.numel() * b.shape[-1]
            if name == _GROUPED:
                self._expert_flops += flops
            else:
                self._other_flops += flops
        return super().__torch_dispatch__(func, types, args, kwargs)

    def note_attention(self, q: Tensor, passes: int) -> None:
        """Add an attention of q [..., width], `passes` times the work of its forward."""
        self._attention_rows += passes * (q.numel() // q.shape[-1])

    def cut(self) -> None:
        """End a piece of work."""
        size, launches = self.bytes - self._before[0], self.launches - self._before[1]
        done = self._expert_flops, self._other_flops, self._attention_rows, size, launches
        if any(done):
            self.events.append(Work(*done))
        self._before = self.bytes, self.launches
        self._expert_flops = self._other_flops = self._attention_rows = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what passages do."""
        start, finish = Passage._start, Passage._finish

        def started(passage: Passage, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
            self.cut()
            hop = passage.group.hop if isinstance(passage.group, Nobody) else 0
            self.events.append(Leave(self._started, hop, rows.numel() * rows.element_size()))
            self._under_way[id(passage)] = self._started
            self._started += 1
            return start(passage, rows, there, here)

        def finished(passage: Passage) -> Tensor:
            self.cut()
            self.events.append(Wait(self._under_way.pop(id(passage))))
            return finish(passage)

        with patch.object(Passage, "_start", started), patch.object(Passage, "_finish", finished):
            yield


@cache
def recorded(load: Workload, layers: int, *, gradient: bool) -> tuple[Event, ...]:
    """Records a loop of the first `layers` layers: with gradient forward, backward and what is computed again, else
    forward alone."""
    part = ModelChunk((), tuple(range(layers)), (), embeds=False, loops=True, predicts=False)
    model, forward_context, x = piece(load, part, load.dtype)
    recorder = _Recorder()

    class Counted(FusedAttention):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            recorder.note_attention(q, 1)
            return FusedAttention.forward(ctx, q, k, v)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            inputs = ctx.saved_tensors[:3]
            recorder.note_attention(inputs[0], 2)
            return tuple(torch.empty_like(tensor) for tensor in inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        return Counted.apply(q, k, v)

    counted = patch.object(attention.functional, "scaled_dot_product_attention", attend)
    compiled = regions_called_by(recorder.as_one_kernel) if load.compiled else nullcontext()
    with one_device(model), counted, compiled, recorder.watching(), recorder:
        with torch.set_grad_enabled(gradient), model.recurrent.adding_up():
            new, _ = model.recurrent.step(x.float(), x, loop=0, context=forward_context)
        if gradient:
            new.backward(torch.empty_like(new))
        recorder.cut()
    return tuple(recorder.events)


def works(events: Iterable[Event]) -> list[Work]:
    """Takes the computations of an order."""
    return [event for event in events if isinstance(event, Work)]
