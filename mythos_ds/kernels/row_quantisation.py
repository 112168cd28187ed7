"""Rows in eight bits while they travel: e4m3 numbers with one scale per row, a power of two.

With such scales a row read back is exact in bfloat16, and goes through the same numbers when it is written again: a
second hop adds no error. That of the first is at most 1/16 of a number, or 2^-17 of the row's largest.
"""

import torch
from torch import Tensor

from mythos_ds.kernels.regions import region

SCALE_BYTES = 4
"""Of a row's scale, which follows its numbers."""
_LARGEST_EXPONENT, _LARGEST_FRACTION = 9, 0.875
"""The largest e4m3 number, 448, is 0.875 * 2^9."""
_SMALLEST_EXPONENT = -126
"""Of a normal fp32 number."""


@region
def quantise_rows(rows: Tensor) -> Tensor:
    """Writes rows [n, dim] of any floating type as uint8 [n, dim + SCALE_BYTES]. A row with an infinity or NaN is read
    back as NaN."""
    exact = rows.float()
    largest = exact.abs().amax(1, keepdim=True)
    fraction, exponent = torch.frexp(largest)
    exponent = exponent - _LARGEST_EXPONENT + (fraction > _LARGEST_FRACTION).int()
    exponent = exponent.clamp_min(_SMALLEST_EXPONENT)
    numbers = torch.ldexp(exact, -exponent).to(torch.float8_e4m3fn)
    scales = torch.ldexp(torch.ones_like(largest), exponent).masked_fill(~largest.isfinite(), torch.nan)
    return torch.cat([numbers.view(torch.uint8), scales.view(torch.uint8)], 1)


@region
def dequantise_rows(written: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Reads what `quantise_rows` wrote: [n, dim]."""
    numbers, scales = written.split([written.shape[1] - SCALE_BYTES, SCALE_BYTES], 1)
    exact = numbers.contiguous().view(torch.float8_e4m3fn).float()
    return (exact * scales.contiguous().view(torch.float32)).to(dtype)
