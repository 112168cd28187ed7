"""Row permutations whose backward is the inverse permutation: deterministic, and no scatter-add."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_ds.kernels.regions import region


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _RepeatPermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.repeats = repeats
        return _repeated(rows, index, repeats=repeats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return _summed(grad, inverse, repeats=ctx.repeats), None, None, None


@region
def _repeated(rows: Tensor, index: Tensor, *, repeats: int) -> Tensor:
    return rows[index // repeats]


@region
def _summed(rows: Tensor, index: Tensor, *, repeats: int) -> Tensor:
    return rows[index].unflatten(0, (-1, repeats)).sum(1)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        index: Tensor,
        inverse: Tensor,
        added: Tensor | None,
        stream: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, index, inverse)
        ctx.with_added, ctx.with_stream = added is not None, stream is not None
        return _weighted(rows, weights, index, added, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, index, inverse = ctx.saved_tensors
        grad_rows, grad_weights, own = _weighted_gradients(grad, rows, weights, index, inverse)
        return grad_rows, grad_weights, None, None, own if ctx.with_added else None, grad if ctx.with_stream else None


@region
def _weighted(rows: Tensor, weights: Tensor, index: Tensor, added: Tensor | None, stream: Tensor | None) -> Tensor:
    own = rows[index].unflatten(0, (-1, weights.shape[1]))
    total = (own * weights[..., None].to(rows.dtype)).sum(1)
    total = total if added is None else total + added
    return total if stream is None else stream + total


@region
def _weighted_gradients(
    grad: Tensor, rows: Tensor, weights: Tensor, index: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.to(rows.dtype)
    own = rows[index].unflatten(0, (-1, weights.shape[1]))
    grad_weights = (grad[:, None] * own).sum(-1).to(weights.dtype)
    factors = weights.to(rows.dtype).flatten()[inverse]
    return grad[inverse // weights.shape[1]] * factors[:, None], grad_weights, grad


def inverse_permutation(index: Tensor) -> Tensor:
    """The permutation that undoes `index` [n]."""
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(index.numel(), device=index.device)
    return inverse


def permute_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Takes rows[index] for a permutation `index` [n] and its inverse."""
    return _PermuteRows.apply(rows, index, inverse)


def repeat_permute_rows(rows: Tensor, index: Tensor, inverse: Tensor, repeats: int) -> Tensor:
    """Repeats each of n rows, then permutes them: [n, dim] -> [n * repeats, dim] for a permutation of n * repeats."""
    return _RepeatPermuteRows.apply(rows, index, inverse, repeats)


def weighted_sum_of_rows(
    rows: Tensor,
    weights: Tensor,
    index: Tensor,
    inverse: Tensor,
    added: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Takes rows[index] of rows [n * k, dim] and adds up each k that follow each other, times their weights [n, k]:
    [n, dim], plus `added` [n, dim] in the rows' dtype where given; and adds that to the residual `stream` [n, dim], in
    the stream's dtype, where given. `index` is a permutation, `inverse` its inverse."""
    return _WeightedSum.apply(rows, weights, index, inverse, added, stream)
