"""What an attention layer computes once per position for all later ones: keys and values, or what they come from."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheEntry:
    """The base of one dataclass per kind of attention; every field is a tensor [batch, seq, ...]."""

    def replaced(self, positions: Tensor, old: Self) -> Self:
        """Takes from `old` what belongs to positions bool [batch, seq]."""
        pairs = [(getattr(self, field.name), getattr(old, field.name)) for field in fields(self)]
        return type(self)(
            *(torch.where(positions.view(*positions.shape, *[1] * (new.dim() - 2)), old, new) for new, old in pairs)
        )


@dataclass(frozen=True)
class GroupedEntry(CacheEntry):
    """The keys (rotated) and values of grouped-query attention."""

    k: Tensor
    """[batch, seq, kv_heads, width]."""
    v: Tensor
    """[batch, seq, kv_heads, width]."""


@dataclass(frozen=True)
class LatentEntry(CacheEntry):
    """The latent of multi-head latent attention, and the rotated key that all heads share."""

    latent: Tensor
    """[batch, seq, kv_lora_rank]."""
    k_rope: Tensor
    """[batch, seq, 1, qk_rope_head_dim]."""


CacheEntries = dict[tuple[int, int], CacheEntry]
"""By (loop, recurrent layer), the layer's index being that in the whole model: every loop has entries of its own."""
