"""Grouped-query attention and multi-head latent attention, [batch, seq, dim] -> [batch, seq, dim].

Both split into `make_entry` (what a cache would hold) and `attend`, so that halted positions can keep their entries.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import ConfigError
from mythos_ds.kernels.attention import AttentionCore
from mythos_ds.kernels.rope import latent_heads
from mythos_ds.model.cache_entry import CacheEntry, GroupedEntry, LatentEntry
from mythos_ds.model.context import ForwardContext, HaltedPositions
from mythos_ds.model.initializer import Initializer, Linear
from mythos_ds.model.norm import RMSNorm

Entry = TypeVar("Entry", bound=CacheEntry)


class Attention(nn.Module, ABC, Generic[Entry]):
    """The base of both kinds: the cache entries of halted positions stay as they were.

    `core` computes the attention itself, from q, k and v; it is no part of the model and has no weights.
    """

    core: AttentionCore

    def __init__(self, core: AttentionCore):
        super().__init__()
        # Past nn.Module: a core that is one itself would add its names to the state_dict.
        object.__setattr__(self, "core", core)

    def forward(
        self, x: Tensor, context: ForwardContext, halted: HaltedPositions | None = None
    ) -> tuple[Tensor, Entry]:
        """Returns the attention's output [batch, seq, dim] and the entry that it read."""
        entry = self.make_entry(x, context)
        if halted is not None:
            entry = entry.replaced(halted.halted, cast(Entry, halted.entry))
        return self.attend(x, entry, context), entry

    @abstractmethod
    def make_entry(self, x: Tensor, context: ForwardContext) -> Entry:
        """Computes the cache entry of normed inputs x [batch, seq, dim]."""

    @abstractmethod
    def attend(self, x: Tensor, entry: Entry, context: ForwardContext) -> Tensor:
        """Computes the attention of queries from x [batch, seq, dim] over `entry`."""


class GroupedQueryAttention(Attention[GroupedEntry]):
    """GQA (Ainslie et al. 2023), RoPE on whole heads, optional QK-norm (Henry et al. 2020) of each head or of all heads
    together (OLMo 2, arXiv 2501.00656), optional biases."""

    def __init__(self, config: ModelConfig, init: Initializer, core: AttentionCore, *, rotates: bool = True):
        super().__init__(core)
        dim, width, std = config.dim, config.resolved_head_dim, config.resolved_init_std
        self.width, self.rotates = width, rotates
        queries, keys = config.n_heads * width, config.resolved_kv_heads * width
        biased = config.attention_biases != "none"
        self.q = Linear(dim, queries, init.at("q"), std, biased=biased)
        self.k = Linear(dim, keys, init.at("k"), std, biased=biased)
        self.v = Linear(dim, keys, init.at("v"), std, biased=biased)
        self.o = Linear(queries, dim, init.at("o"), config.resolved_output_std, biased=config.attention_biases == "all")
        self.norms_all = config.qk_norm_span == "all"
        self.q_norm = RMSNorm(queries if self.norms_all else width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(keys if self.norms_all else width, config.norm_eps) if config.qk_norm else None

    def make_entry(self, x: Tensor, context: ForwardContext) -> GroupedEntry:
        return GroupedEntry(self._heads(self.k(x), self.k_norm, context), self.v(x).unflatten(-1, (-1, self.width)))

    def _heads(self, x: Tensor, norm: RMSNorm | None, context: ForwardContext) -> Tensor:
        """Queries or keys [batch, seq, heads * width] in heads, normed and rotated."""
        x = norm(x) if norm is not None and self.norms_all else x
        x = x.unflatten(-1, (-1, self.width))
        x = x if norm is None or self.norms_all else norm(x)
        return context.rotary.rotate(x) if self.rotates else x

    def attend(self, x: Tensor, entry: GroupedEntry, context: ForwardContext) -> Tensor:
        q = self._heads(self.q(x), self.q_norm, context)
        out = self.core(q, entry.k, entry.v, scale=self.width**-0.5, documents=context.documents)
        return self.o(out.flatten(-2))


class MultiHeadLatentAttention(Attention[LatentEntry]):
    """MLA of DeepSeek-V2: keys and values come from one latent per token, RoPE from one key shared by all heads."""

    def __init__(self, config: ModelConfig, init: Initializer, core: AttentionCore):
        super().__init__(core)
        latent, nope, rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        value = config.v_head_dim
        if latent is None or nope is None or rope is None or value is None:
            raise ConfigError("model: attn_type mla needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim")
        dim, heads, std, eps = config.dim, config.n_heads, config.resolved_init_std, config.norm_eps
        self.heads, self.latent, self.nope, self.rope = heads, latent, nope, rope
        self.full_rank_query = config.q_lora_rank is None
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * (nope + rope), init.at("q_proj"), std)
        else:
            self.q_down = Linear(dim, config.q_lora_rank, init.at("q_down"), std)
            self.q_norm = RMSNorm(config.q_lora_rank, eps)
            self.q_up = Linear(config.q_lora_rank, heads * (nope + rope), init.at("q_up"), std)
        self.kv_down = Linear(dim, latent + rope, init.at("kv_down"), std)
        self.kv_norm = RMSNorm(latent, eps)
        self.kv_up = Linear(latent, heads * (nope + value), init.at("kv_up"), std)
        self.o = Linear(heads * value, dim, init.at("o"), config.resolved_output_std)

    def make_entry(self, x: Tensor, context: ForwardContext) -> LatentEntry:
        latent, k_rope = self.kv_down(x).split([self.latent, self.rope], dim=-1)
        return LatentEntry(self.kv_norm(latent), context.rotary.rotate(k_rope[:, :, None]))

    def attend(self, x: Tensor, entry: LatentEntry, context: ForwardContext) -> Tensor:
        q = self.q_proj(x) if self.full_rank_query else self.q_up(self.q_norm(self.q_down(x)))
        q, k, v = latent_heads(
            q,
            self.kv_up(entry.latent),
            entry.k_rope,
            context.rotary.cos,
            context.rotary.sin,
            heads=self.heads,
            nope=self.nope,
            interleaved=context.rotary.interleaved,
        )
        scale = (self.nope + self.rope) ** -0.5
        return self.o(self.core(q, k, v, scale=scale, documents=context.documents).flatten(-2))


def make_attention(config: ModelConfig, init: Initializer, core: AttentionCore, *, rotates: bool) -> Attention[Any]:
    """Builds the attention that `config.attn_type` names; `rotates`: with RoPE, which MLA always has."""
    if config.attn_type == "mla":
        return MultiHeadLatentAttention(config, init, core)
    return GroupedQueryAttention(config, init, core, rotates=rotates)


def rotary_width(config: ModelConfig) -> int:
    """Counts the channels of a head that carry RoPE."""
    return config.qk_rope_head_dim or 0 if config.attn_type == "mla" else config.resolved_head_dim
