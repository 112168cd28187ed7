"""The modules of RMS normalisation."""

import torch
from torch import Tensor, nn

from mythos_ds.kernels.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a gain: any float [..., dim] -> the gain's dtype [..., dim], which is the compute dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class AddRMSNorm(RMSNorm):
    """The norm of a residual stream to which a branch is added first."""

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns the new stream x + branch, and its norm: [..., dim] each."""
        return add_rms_norm(x, branch, self.weight, eps=self.eps)
