"""Rotary position embedding (Su et al. 2021) of heads, by tables of cos and sin, and the heads of MLA built with it.

Tables are fp32 [batch or 1, seq, 1, width / 2]; computed in fp32, returned in the heads' dtype.
"""

import torch
from torch import Tensor

from mythos_ds.kernels.regions import region


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    if interleaved:
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
    return torch.cat(rotated, dim=-1).to(x.dtype)


@region
def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates heads x [batch, seq, heads, width]; `interleaved`: pairs of channels lie side by side."""
    return _rotated(x, cos, sin, interleaved)


@region
def latent_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, heads: int, nope: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the heads of multi-head latent attention (DeepSeek-V2): queries, keys, values [batch, seq, heads, width].

    q [batch, seq, heads * (nope + rope)] is split and rotated; kv [batch, seq, heads * (nope + value)] holds the keys'
    other channels and the values; k_rope [batch, seq, 1, rope] is rotated already, and shared by all heads.
    """
    q = q.unflatten(-1, (heads, -1))
    q = torch.cat([q[..., :nope], _rotated(q[..., nope:], cos, sin, interleaved)], dim=-1)
    k, v = kv.unflatten(-1, (heads, -1)).tensor_split([nope], dim=-1)
    k = torch.cat([k, k_rope.expand(-1, -1, heads, -1)], dim=-1)
    return q, k, v.contiguous()
