"""Row permutations whose backward is the inverse permutation: deterministic, and no scatter-add."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        return rows[index // repeats]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.repeats)).sum(1), None, None, None


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
