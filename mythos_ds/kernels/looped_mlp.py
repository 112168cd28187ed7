"""SwiGLU of stacked experts, one expert after the other, with its gradients written out.

Results and gradients of an expert are written where they belong in the whole tensors, and of what lies between only two
products are kept. In plain torch it is w2(silu(w1 x) * w3 x) of each expert's rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _StackedGradient:
    """The gradient of stacked weights in one backward, of which experts write their parts; it becomes whole when it is
    taken. In the weight's own type of gradients."""

    def __init__(self, weight: Tensor):
        own = getattr(weight, "grad_dtype", None) if weight.is_leaf else None  # what is computed has none to ask for
        self._like = weight.shape, own or weight.dtype, weight.device
        self._whole: Tensor | None = None
        self._written: set[int] = set()
        self._backward = -1

    def _begin(self) -> Tensor:
        """The memory; a backward that broke off leaves nothing to the next one."""
        current = torch._C._current_graph_task_id()
        if self._whole is None or current != self._backward:
            shape, dtype, device = self._like
            self._whole, self._written = torch.empty(shape, dtype=dtype, device=device), set()
            self._backward = current
        return self._whole

    def add(self, index: int, delta: Tensor, rows: Tensor) -> None:
        """Adds delta^T rows to the gradient of expert `index`."""
        own = self._begin()[index]
        if index in self._written:
            own += delta.t() @ rows
        elif own.dtype == delta.dtype:
            torch.mm(delta.t(), rows, out=own)
        else:
            own.copy_(delta.t() @ rows)
        self._written.add(index)

    def take(self) -> Tensor:
        """Gives the gradient away: zeros for experts that added nothing, as every rank has a gradient."""
        whole = self._begin()
        for index in range(len(whole)):
            if index not in self._written:
                whole[index].zero_()
        self._whole = None
        return whole


class _HandOver(torch.autograd.Function):
    """Stands between weights and the calls that use them: its backward comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: _StackedGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph: its gradient would lack the experts' part, without a word
            raise RuntimeError("the gradient of looped experts' weights has no gradient of its own")
        return ctx.gradient.take(), None


@dataclass(frozen=True)
class GradientSums:
    """Adds up the gradients of stacked w1, w2 and w3 over the calls of one graph.

    A graph that runs the same experts in many loops would otherwise make a whole gradient in each, with zeros for every
    expert without rows there, and add them all up; so every loop adds to the experts it used.
    """

    gradients: tuple[_StackedGradient, ...]
    tokens: tuple[Tensor, ...]
    """Empty tensors by which a call depends on the weights."""

    @classmethod
    def of(cls, *weights: Tensor) -> "GradientSums":
        """Makes those of w1, w2 and w3, with nothing added yet."""
        gradients = tuple(map(_StackedGradient, weights))
        return cls(gradients, tuple(_HandOver.apply(w, g) for w, g in zip(weights, gradients, strict=True)))


class _LoopedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Sequence[Tensor],
        counts: Sequence[int],
        gradients: Any,
        token1: Tensor | None,
        token2: Tensor | None,
        token3: Tensor | None,
    ) -> Tensor:
        w1, w2, w3 = weights
        gate, up = (rows.new_empty(rows.shape[0], w1.shape[1]) for _ in range(2))
        out = rows.new_empty(rows.shape[0], w2.shape[1])
        for index, x, g, u, y in _by_expert(counts, rows, gate, up, out):
            torch.mm(x, w1[index].t(), out=g)
            torch.mm(x, w3[index].t(), out=u)
            torch.mm(functional.silu(g).mul_(u), w2[index].t(), out=y)
        # The weights and no views of them, which would hold on to what ZeRO-3 gathered.
        ctx.save_for_backward(rows, *weights, gate, up)
        ctx.counts, ctx.gradients = counts, gradients
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w2, w3, gate, up = ctx.saved_tensors
        d_rows = rows.new_empty(rows.shape)
        nodes = [node for node, _ in ctx.next_functions[-3:]]
        # Nothing is added for weights whose gradient nobody asked for: they are frozen, or only that of x is computed.
        asked = [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
        first, second, third = (g if a else None for g, a in zip(ctx.gradients, asked, strict=True))
        for index, x, g, u, d_y, d_x in _by_expert(ctx.counts, rows, gate, up, grad, d_rows):
            activated = functional.silu(g)
            d_hidden = d_y @ w2[index]
            d_up = d_hidden * activated
            d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(u), g)
            if second is not None:
                second.add(index, d_y, activated.mul_(u))
            if third is not None:
                third.add(index, d_up, x)
            if first is not None:
                first.add(index, d_gate, x)
            torch.mm(d_up, w3[index], out=d_x)
            d_x += d_gate @ w1[index]
        return d_rows, None, None, None, None, None, None


def _by_expert(counts: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each expert that has rows, with its rows of each tensor."""
    for index, *parts in zip(range(len(counts)), *(x.split(counts) for x in tensors), strict=True):
        if counts[index]:
            yield index, *parts


def looped_swiglu(
    rows: Tensor, counts: Sequence[int], w1: Tensor, w2: Tensor, w3: Tensor, *, sums: GradientSums | None = None
) -> Tensor:
    """Computes w2(silu(w1 x) * w3 x) of each expert's rows.

    rows [n, dim] sorted by expert, counts of them by expert; w1 and w3 [n_experts, hidden, dim], w2 [n_experts, dim,
    hidden]. `sums`: of these weights, made for several calls in one graph; None: this call adds alone.
    """
    if torch.is_grad_enabled():
        sums = GradientSums.of(w1, w2, w3) if sums is None else sums
        return _LoopedSwiGLU.apply(rows, (w1, w2, w3), counts, sums.gradients, *sums.tokens)
    return _LoopedSwiGLU.apply(rows, (w1, w2, w3), counts, (), None, None, None)
