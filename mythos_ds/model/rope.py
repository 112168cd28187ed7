"""Rotary position embedding (Su et al. 2021) with real cos/sin.

The tables are computed from the positions in each forward: a frequency buffer would be cast to bf16 and lose its value
under DeepSpeed's `zero.Init`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The cos and sin tables, fp32 [batch or 1, seq, 1, width / 2], for one head width."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def at(cls, positions: Tensor, width: int, theta: float, interleaved: bool) -> "Rotary":
        """Computes the tables for integer positions [batch or 1, seq] and heads of `width` channels."""
        exponent = torch.arange(0, width, 2, device=positions.device).float() / width
        frequency = torch.pow(torch.full_like(exponent, theta), -exponent)
        angle = positions.float()[..., None, None] * frequency
        return cls(angle.cos(), angle.sin(), interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates x [batch, seq, heads, width] by its positions; computed in fp32, returned in x's dtype."""
        if self.interleaved:
            first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = x.float().chunk(2, dim=-1)
        rotated = (first * self.cos - second * self.sin, first * self.sin + second * self.cos)
        if self.interleaved:
            return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
        return torch.cat(rotated, dim=-1).to(x.dtype)
