"""RMS normalisation in fp32 (Zhang & Sennrich 2019)."""

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.regions import region


def _gained(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Both operands fp32: of mixed types torch has no fused kernel.
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(weight.dtype)


@region
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Computes x / rms(x) times the gain `weight` [dim], over the last dimension, in fp32: any float [..., dim] -> the
    gain's dtype."""
    return _gained(x, weight, eps)


@region
def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Computes x + branch, and its `rms_norm`: [..., dim] each."""
    total = x + branch
    return total, _gained(total, weight, eps)


@region
def plain_rms_norm(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes x / rms(x) over the last dimension, in fp32, returned as `dtype`."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(dtype)
