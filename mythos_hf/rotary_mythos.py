"""Rotary position embedding; stretched to longer sequences by transformers' own formulas."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_mythos import MythosConfig, filled


def rotary_tables(positions: Tensor, config: MythosConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [batch, seq, 1, width / 2]."""
    rope = filled(config.rope_parameters)
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind != "default":
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, positions.device)
        angle = positions.float()[..., None, None] * frequency
        return angle.cos() * factor, angle.sin() * factor
    width = filled(config.qk_rope_head_dim if config.attention_type == "mla" else config.head_dim)
    exponent = torch.arange(0, width, 2, device=positions.device).float() / width
    frequency = torch.pow(torch.full_like(exponent, theta), -exponent)
    angle = positions.float()[..., None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """RoPE on x [batch, seq, heads, width]."""
    cos, sin = tables
    if interleaved:
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
