"""SwiGLU of stacked experts, one expert after the other, with its gradients written out.

Results and gradients of an expert are written where they belong in the whole tensors, and of what lies between only two
products are kept. In plain torch it is w2(silu(w1 x) * w3 x) of each expert's rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mythos_ds.kernels.gradient_sums import GradientSums, asked


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
        first, second, third = asked(ctx, ctx.gradients)
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
