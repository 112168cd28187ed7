"""RMS normalisation in fp32 (Zhang & Sennrich 2019)."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Computes x / rms(x) over the last dimension, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMSNorm with a gain: any float [..., dim] -> the gain's dtype [..., dim], which is the compute dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (rms_norm(x, self.eps) * self.weight.float()).to(self.weight.dtype)
