"""Attention, with the norm and the context that it needs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_mythos import MythosConfig, filled
from .rotary_mythos import rotate


class MythosContext(NamedTuple):
    """What attention needs beside the stream. keywords: what its implementation reads. hidden_states, attentions:
    whether the caller keeps those of each layer."""

    tables: tuple[Tensor, Tensor]
    mask: Any
    cache: Any
    keywords: dict[str, Any]
    hidden_states: bool = False
    attentions: bool = False


def rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x), fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class MythosRMSNorm(nn.Module):
    """RMSNorm computed in fp32, returned in the gain's type."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (rms(x, self.eps) * self.weight.float()).to(self.weight.dtype)


class MythosAttention(nn.Module):
    """Grouped-query or multi-head latent attention; `slot` says which cache entry belongs to this call."""

    def __init__(self, config: MythosConfig, index: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.attention_dropout = config, 0, True, 0.0
        self.rotates = index not in filled(config.no_rope_layers)
        self.head_dim = filled(config.head_dim)
        self.scaling = self.head_dim**-0.5
        heads, kv_heads, dim = config.num_attention_heads, filled(config.num_key_value_heads), config.hidden_size
        self.num_key_value_groups = heads // kv_heads
        self.latent = config.attention_type == "mla"
        if self.latent:
            self.nope, self.rope = filled(config.qk_nope_head_dim), filled(config.qk_rope_head_dim)
            self.value, self.latent_dim = filled(config.v_head_dim), filled(config.kv_lora_rank)
            if config.q_lora_rank is None:
                self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
            else:
                self.q_a_proj = nn.Linear(dim, config.q_lora_rank, bias=False)
                self.q_a_layernorm = MythosRMSNorm(config.q_lora_rank, config.rms_norm_eps)
                self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.head_dim, bias=False)
            self.kv_a_proj_with_mqa = nn.Linear(dim, self.latent_dim + self.rope, bias=False)
            self.kv_a_layernorm = MythosRMSNorm(self.latent_dim, config.rms_norm_eps)
            self.kv_b_proj = nn.Linear(self.latent_dim, heads * (self.nope + self.value), bias=False)
            self.o_proj = nn.Linear(heads * self.value, dim, bias=False)
            return
        biased = config.attention_biases != "none"
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=biased)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=biased)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=biased)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=config.attention_biases == "all")
        if config.qk_norm:
            together = (heads, kv_heads) if config.qk_norm_span == "all" else (1, 1)
            self.q_norm, self.k_norm = (MythosRMSNorm(n * self.head_dim, config.rms_norm_eps) for n in together)

    def forward(self, x: Tensor, context: MythosContext, slot: int) -> tuple[Tensor, Tensor | None]:
        """x [batch, seq, dim] -> the same, and the weights [batch, heads, seq, keys] that `eager` has."""
        q, k, v = self._latent(x, context.tables) if self.latent else self._grouped(x, context.tables)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        keywords = dict(context.keywords)
        if isinstance(context.cache, PagedAttentionCache):
            k, v = context.cache.update(k, v, slot, kwargs=keywords)  # changes them for this slot
        elif context.cache is not None:
            k, v = context.cache.update(k, v, slot)
        self.layer_idx = slot  # paged attention reads its cache entry from the module
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, weights = attend(self, q, k, v, context.mask, dropout=0.0, scaling=self.scaling, **keywords)
        if self.latent:
            out = out[..., : self.value]
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous()), weights

    def _grouped(self, x: Tensor, tables) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x).view(shape)
        if self.config.qk_norm:  # of each head, or over all of them
            q, k = (x if self.config.qk_norm_span == "all" else x.view(shape) for x in (q, k))
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(shape), k.view(shape)
        if self.rotates:
            q, k = (rotate(x, tables, self.config.rope_interleaved) for x in (q, k))
        return q, k, v

    def _latent(self, x: Tensor, tables) -> tuple[Tensor, Tensor, Tensor]:
        heads, interleaved = self.config.num_attention_heads, self.config.rope_interleaved
        q = self.q_proj(x) if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent_dim, self.rope], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = expanded.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope[:, :, None], tables, interleaved).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, tables, interleaved)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        return q, k, functional.pad(v, (0, self.head_dim - self.value))
