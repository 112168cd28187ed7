"""SwiGLU of many experts at once: grouped products where they are fast, else one expert after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_GROUP_ROWS = 8


def grouped_matmul_is_fast(rows: Tensor, hidden: int) -> bool:
    """Says whether torch's grouped matmul has a fused kernel here: bf16 on CUDA, compute capability 8.0 and up, and
    widths of whole 16-byte units."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    if rows.shape[1] % 8 or hidden % 8:
        return False
    return torch.cuda.get_device_capability(rows.device) >= (8, 0)


def grouped_swiglu(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Computes w2(silu(w1 x) * w3 x) of each expert's rows in three grouped products.

    rows [n, dim] sorted by expert, counts int64 [n_experts]; w1 and w3 [n_experts, hidden, dim], w2 [n_experts, dim,
    hidden]. Nothing waits for the counts. The same as `looped_swiglu`.
    """
    padded, ends, places = _align_groups(rows, counts)
    gate = torch._grouped_mm(padded, w1.transpose(-2, -1), offs=ends)
    up = torch._grouped_mm(padded, w3.transpose(-2, -1), offs=ends)
    results = torch._grouped_mm(functional.silu(gate) * up, w2.transpose(-2, -1), offs=ends)
    return results.index_select(0, places)


def _align_groups(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pads each expert's group of rows [n, dim] to a multiple of 8 rows; also returns the groups' ends int32, and where
    each row went int64 [n]. The kernels want groups of 16 bytes in the weight gradient; empty groups stay empty.

    The buffer's size does not depend on the counts, so nothing waits for them; rows past the last end are unused.
    """
    n = rows.shape[0]
    aligned = (counts + _GROUP_ROWS - 1) // _GROUP_ROWS * _GROUP_ROWS
    shift = (aligned.cumsum(0) - aligned) - (counts.cumsum(0) - counts)
    places = torch.arange(n, device=rows.device) + shift.repeat_interleave(counts, output_size=n)
    buffer = rows.new_zeros(n + _GROUP_ROWS * len(counts), rows.shape[1])
    return buffer.index_copy(0, places, rows), aligned.cumsum(0).to(torch.int32), places


def looped_swiglu(rows: Tensor, counts: Sequence[int], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Computes the same expert by expert, in plain torch."""
    # unbind, not w[e]: each select zero-fills the whole stack in backward, O(E^2).
    # Experts without tokens take part too: every rank's graph must hold the same collectives.
    outputs = [
        functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
        for x, gate, down, up in zip(rows.split(counts), w1.unbind(0), w2.unbind(0), w3.unbind(0), strict=True)
    ]
    return torch.cat(outputs)
