"""Copies of rows and sums of copies, any number to a row: the backward of one is the other, deterministic.

A sum is torch's bag of embeddings: it gathers, weighs and adds up in one kernel, in fp32 whatever the rows' dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Segments:
    """m copies of n rows, in any order. They are no floats: functions keep them as they are, so that a recompute need
    not come as far as they."""

    row_of: Tensor
    """int64 [m]: the row of each copy."""
    by_row: Tensor
    """int64 [m]: the copies, those of the first row first."""
    bounds: Tensor
    """int64 [n + 1]: where in `by_row` each row's copies begin; last, m."""

    @classmethod
    def of(cls, row_of: Tensor, rows: int) -> "Segments":
        """Makes those of `rows` rows."""
        return cls(row_of, row_of.argsort(stable=True), bounds_of(row_of, rows))


def bounds_of(row_of: Tensor, rows: int) -> Tensor:
    """Finds where each row's copies begin once row_of int64 [m] is sorted: int64 [rows + 1]."""
    counts = row_of.new_zeros(rows + 1).scatter_add_(0, row_of + 1, torch.ones_like(row_of))
    return counts.cumsum(0)


def repeat_rows(rows: Tensor, copies: Segments) -> Tensor:
    """Takes a row for each copy: [n, dim] -> [m, dim]."""
    return _Repeat.apply(rows, copies)


def sum_rows(rows: Tensor, copies: Segments, added: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
    """Adds up the copies of each row: [m, dim] -> [n, dim], plus `added` [n, dim] in the rows' dtype where given; and
    adds that to the residual `stream` [n, dim], in the stream's dtype, where given."""
    return _Sum.apply(rows, copies, added, stream)


def weighted_sum_rows(rows: Tensor, weights: Tensor, copies: Segments) -> Tensor:
    """Adds up the copies of each row times their weights: [m, dim] and fp32 [m] -> [n, dim]."""
    return _WeightedSum.apply(rows, weights, copies)


def _sums(rows: Tensor, copies: Segments, weights: Tensor | None = None) -> Tensor:
    return torch.embedding_bag(rows, copies.by_row, copies.bounds, False, 0, False, weights, True)[0]


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Segments) -> Tensor:
        ctx.copies = copies
        return rows[copies.row_of]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sums(grad.contiguous(), ctx.copies), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Segments, added: Tensor | None, stream: Tensor | None) -> Tensor:
        ctx.copies, ctx.dtype = copies, rows.dtype
        ctx.with_added, ctx.with_stream = added is not None, stream is not None
        total = _sums(rows, copies)
        total = total if added is None else total + added
        return total if stream is None else stream + total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = grad.to(ctx.dtype)
        return own[ctx.copies.row_of], None, own if ctx.with_added else None, grad if ctx.with_stream else None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, copies: Segments) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(rows, weights)
        return _sums(rows, copies, weights.to(rows.dtype)[copies.by_row])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        own = grad.to(rows.dtype)[ctx.copies.row_of]
        grad_weights = (own * rows).sum(-1).to(weights.dtype)
        return own.mul_(weights.to(rows.dtype)[:, None]), grad_weights, None
