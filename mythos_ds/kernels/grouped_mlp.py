"""SwiGLU of many experts at once, in grouped products; `looped_swiglu` computes the same one expert after the other."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.swiglu import swiglu

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


def grouped_swiglu(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Computes w2(silu(w1 x) * w3 x) of each expert's rows in three grouped products.

    rows [n, dim] sorted by expert, counts int64 [n_experts]; w1 and w3 [n_experts, hidden, dim], w2 [n_experts, dim,
    hidden]. Nothing waits for the counts. The same as `looped_swiglu`.
    """
    product: Callable[..., Tensor] = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    places = None
    if _takes_any_groups(rows):
        ends = counts.cumsum(0, dtype=torch.int32)
    else:
        rows, ends, places = _align_groups(rows, counts, least=1 if _misses_empty_groups(rows) else 0)
    gate = product(rows, w1.transpose(-2, -1), offs=ends)
    up = product(rows, w3.transpose(-2, -1), offs=ends)
    results = product(swiglu(gate, up), w2.transpose(-2, -1), offs=ends)
    return results if places is None else results.index_select(0, places)


def _takes_any_groups(rows: Tensor) -> bool:
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
