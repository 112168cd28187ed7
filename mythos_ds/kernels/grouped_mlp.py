"""SwiGLU of many experts at once, in grouped products; `looped_swiglu` computes the same one expert after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mythos_ds.kernels.gradient_sums import GradientSums, asked
from mythos_ds.kernels.swiglu import swiglu, swiglu_gradients

_GROUP_ROWS = 8
_MAX_GROUPS = 1023


def grouped_matmul_is_fast(rows: Tensor, hidden: int, n_experts: int) -> bool:
    """Says whether torch's grouped matmul has a fused kernel for these rows: bf16 on Hopper or Blackwell (compute
    capability 9 and 10; elsewhere torch loops over the experts, and waits for their counts), widths of whole 16-byte
    units, and fewer than 1,024 experts."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not 0 < n_experts <= _MAX_GROUPS:
        return False
    if rows.shape[1] % 8 or hidden % 8:
        return False
    major, _ = torch.cuda.get_device_capability(rows.device)
    # torch 2.8 has it for Hopper alone; those that have the public name take Blackwell too.
    return (major == 9 and hasattr(torch, "_grouped_mm")) or (major == 10 and hasattr(functional, "grouped_mm"))


def grouped_swiglu(
    rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *, sums: GradientSums | None = None
) -> Tensor:
    """Computes w2(silu(w1 x) * w3 x) of each expert's rows in three grouped products.

    rows [n, dim] sorted by expert, counts int64 [n_experts]; w1 and w3 [n_experts, hidden, dim], w2 [n_experts, dim,
    hidden]. Nothing waits for the counts. The same as `looped_swiglu`, `sums` too.
    """
    if torch.is_grad_enabled():
        sums = GradientSums.of(w1, w2, w3) if sums is None else sums
        return _GroupedSwiGLU.apply(rows, (w1, w2, w3), counts, sums.gradients, *sums.tokens)
    return _GroupedSwiGLU.apply(rows, (w1, w2, w3), counts, (), None, None, None)


def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """A product for each group of rows; of columns and rows, [groups, columns of a, columns of b]."""
    grouped: Callable[..., Tensor] = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(a, b, offs=ends)


class _GroupedSwiGLU(torch.autograd.Function):
    """Its gradients are written out: those of weights are added up in place, over loops and parts of a micro-batch,
    where autograd would make a whole one in each and add them all up."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        counts: Tensor,
        gradients: Any,
        token1: Tensor | None,
        token2: Tensor | None,
        token3: Tensor | None,
    ) -> Tensor:
        w1, w2, w3 = weights
        places = None
        if takes_any_groups(rows):
            ends = counts.cumsum(0, dtype=torch.int32)
        else:
            rows, ends, places = _align_groups(rows, counts, least=1 if _misses_empty_groups(rows) else 0)
        gate, up = _product(rows, w1.transpose(-2, -1), ends), _product(rows, w3.transpose(-2, -1), ends)
        hidden = swiglu(gate, up)
        results = _product(hidden, w2.transpose(-2, -1), ends)
        ctx.save_for_backward(rows, *weights, gate, up, hidden, ends, places)
        ctx.gradients = gradients
        return results if places is None else results.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w2, w3, gate, up, hidden, ends, places = ctx.saved_tensors
        grad = grad.contiguous() if places is None else grad.new_zeros(rows.shape).index_copy_(0, places, grad)
        first, second, third = asked(ctx, ctx.gradients)
        d_gate, d_up = swiglu_gradients(gate, up, _product(grad, w2, ends))
        for gradient, delta, given in ((second, grad, hidden), (third, d_up, rows), (first, d_gate, rows)):
            if gradient is not None:
                gradient.add_all(_product(delta.transpose(-2, -1), given, ends))
        d_rows = _product(d_up, w3, ends).add_(_product(d_gate, w1, ends))
        d_rows = d_rows if places is None else d_rows.index_select(0, places)
        return d_rows, None, None, None, None, None, None


def takes_any_groups(rows: Tensor) -> bool:
    """Whether groups of rows may have any size, none included, and end with the last row: with Hopper's kernel in those
    versions of torch that have the public name. Of no rows at all a kernel cannot be sure to make something."""
    if not rows.is_cuda or not rows.shape[0] or not hasattr(functional, "grouped_mm"):
        return False
    major, _ = torch.cuda.get_device_capability(rows.device)
    return major == 9


def _misses_empty_groups(rows: Tensor) -> bool:
    """Whether torch leaves the weight gradient of a group without rows as it found the memory: on Blackwell, up to
    torch 2.13 at least."""
    return rows.is_cuda and torch.cuda.get_device_capability(rows.device)[0] == 10


def _align_groups(rows: Tensor, counts: Tensor, *, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pads each expert's group of rows [n, dim], taken for at least `least` rows, to a multiple of 8; also returns the
    groups' ends int32, and where each row went int64 [n].

    The buffer's size does not depend on the counts, so nothing waits for them; rows past the last end are unused.
    """
    n = rows.shape[0]
    aligned = (counts.clamp_min(least) + _GROUP_ROWS - 1) // _GROUP_ROWS * _GROUP_ROWS
    shift = (aligned.cumsum(0) - aligned) - (counts.cumsum(0) - counts)
    places = torch.arange(n, device=rows.device) + shift.repeat_interleave(counts, output_size=n)
    # A group grows by at most 7 rows, an empty one by 8 * least; older torch wants a row past the last end.
    buffer = rows.new_zeros(n + _GROUP_ROWS * (len(counts) + least), rows.shape[1])
    return buffer.index_copy(0, places, rows), aligned.cumsum(0).to(torch.int32), places
