"""Attention of one layer on vLLM's matrices and caches: ranks divide heads, and each loop has a cache of its own.

vLLM keeps one cache per Attention: loops that shared one would overwrite each other's keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs

from mythos_hf.attention_mythos import MythosRMSNorm
from mythos_hf.configuration_mythos import MythosConfig, filled
from mythos_hf.rotary_mythos import rotate

_ABSORBED = ("W_UV", "W_UK_T", "W_K", "W_K_scale", "W_V", "W_V_scale")
"""What vLLM makes of kv_b_proj for decoding, on one platform or another."""


class DividedNorm(nn.Module):
    """RMSNorm over all heads of a layer where each rank has some: the mean square is that of all."""

    def __init__(self, heads: int, head_dim: int, eps: float):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        own = max(1, heads // ranks)
        self.copies = own * ranks // heads
        """Ranks that have the same heads."""
        self.eps, self.width = eps, heads * head_dim
        self.weight = nn.Parameter(torch.ones(own * head_dim))
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, own heads * head_dim] -> the same."""
        squares = tensor_model_parallel_all_reduce(x.float().square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / (self.copies * self.width) + self.eps)
        return (x.float() * scale * self.weight.float()).to(self.weight.dtype)

    def load(self, place: Tensor, value: Tensor) -> None:
        """Copy this rank's part of the gain."""
        first = get_tensor_model_parallel_rank() // self.copies * len(place)
        place.data.copy_(value[first : first + len(place)])


class LatentCache(MLAAttention):
    """Latent attention with one loop's cache. first: that of the layer's first loop, whose absorbed matrices it takes:
    they are the same, and of an fp8 matrix vLLM would keep a copy for each loop."""

    def __init__(self, *sizes: Any, first: "LatentCache | None", **options: Any):
        super().__init__(*sizes, **options)
        self.first = (first,)  # not a submodule

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Make the absorbed matrices, or take them; vLLM comes to the first loop first."""
        (first,) = self.first
        if first is None:
            super().process_weights_after_loading(act_dtype)
            return
        self.impl.process_weights_after_loading(act_dtype)
        for name in _ABSORBED:
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))
        set_default_quant_scales(self)


class LoopedAttention(nn.Module):
    """What both kinds of attention have: sizes of a rank, and a cache per slot."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], index: int):
        super().__init__()
        self.config, self.ranks = config, get_tensor_model_parallel_world_size()
        self.rotates = index not in filled(config.no_rope_layers)
        self.head_dim = filled(config.head_dim)
        self.scaling = self.head_dim**-0.5
        self.heads = config.num_attention_heads // self.ranks
        self.kv_heads = max(1, filled(config.num_key_value_heads) // self.ranks)
        self.matrices: dict[str, Any] = {"quant_config": vllm_config.quant_config}
        self.prefix = prefix
        above = prefix.rsplit("model.", 1)[0]
        self.caches = [f"{above}model.layers.{slot}.self_attn.attn" for slot in slots]

    def matrix(self, kind: Any, name: str, *sizes: int, bias: bool = False) -> Any:
        """One of vLLM's matrices under its name in the folder."""
        return kind(*sizes, bias=bias, prefix=f"{self.prefix}.{name}", **self.matrices)

    def expanded(self, vllm_config: VllmConfig) -> nn.ModuleList:
        """An Attention with keys and values of each head for each loop."""
        options = {"num_kv_heads": self.kv_heads, "cache_config": vllm_config.cache_config, "quant_config": None}
        return nn.ModuleList(
            Attention(self.heads, self.head_dim, self.scaling, prefix=prefix, **options) for prefix in self.caches
        )

    def rotated(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [tokens, heads, width] turned by its positions."""
        return rotate(x[None], tables, self.config.rope_interleaved)[0]


class GroupedAttention(LoopedAttention):
    """Grouped-query attention; ranks beyond the number of key and value heads have copies of them."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], index: int):
        super().__init__(config, vllm_config, prefix, slots, index)
        heads, kv_heads, dim = config.num_attention_heads, filled(config.num_key_value_heads), config.hidden_size
        biased = config.attention_biases != "none"
        self.qkv_proj = self.matrix(QKVParallelLinear, "qkv_proj", dim, self.head_dim, heads, kv_heads, bias=biased)
        last = config.attention_biases == "all"
        self.o_proj = self.matrix(RowParallelLinear, "o_proj", heads * self.head_dim, dim, bias=last)
        if config.qk_norm:
            self.q_norm, self.k_norm = self._norm(heads), self._norm(kv_heads)
        self.attn = self.expanded(vllm_config)

    def _norm(self, heads: int) -> nn.Module:
        if self.config.qk_norm_span == "all":
            return DividedNorm(heads, self.head_dim, self.config.rms_norm_eps)
        return MythosRMSNorm(self.head_dim, self.config.rms_norm_eps)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], loop: int = 0) -> Tensor:
        """x [tokens, dim] -> the same."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x)[0].split([width, kv_width, kv_width], dim=-1)
        together = self.config.qk_norm and self.config.qk_norm_span == "all"
        if together:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        if self.config.qk_norm and not together:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = self.rotated(q, tables), self.rotated(k, tables)
        return self.o_proj(self.attn[loop](q.flatten(1), k.flatten(1), v))[0]


class LatentAttention(LoopedAttention):
    """Multi-head latent attention. Its cache has latents where vLLM has a kernel for them, else keys and values."""

    def __init__(self, config: MythosConfig, vllm_config: VllmConfig, prefix: str, slots: list[int], index: int):
        super().__init__(config, vllm_config, prefix, slots, index)
        heads, dim, eps = config.num_attention_heads, config.hidden_size, config.rms_norm_eps
        self.nope, self.rope = filled(config.qk_nope_head_dim), filled(config.qk_rope_head_dim)
        self.value, self.latent = filled(config.v_head_dim), filled(config.kv_lora_rank)
        if (low := config.q_lora_rank) is None:
            self.q_proj = self.matrix(ColumnParallelLinear, "q_proj", dim, heads * self.head_dim)
        else:
            self.q_a_proj = self.matrix(ReplicatedLinear, "q_a_proj", dim, low)
            self.q_a_layernorm = MythosRMSNorm(low, eps)
            self.q_b_proj = self.matrix(ColumnParallelLinear, "q_b_proj", low, heads * self.head_dim)
        width = self.latent + self.rope
        self.kv_a_proj_with_mqa = self.matrix(ReplicatedLinear, "kv_a_proj_with_mqa", dim, width)
        self.kv_a_layernorm = MythosRMSNorm(self.latent, eps)
        width = heads * (self.nope + self.value)
        self.kv_b_proj = self.matrix(ColumnParallelLinear, "kv_b_proj", self.latent, width)
        self.o_proj = self.matrix(RowParallelLinear, "o_proj", heads * self.value, dim)
        self.keeps_latents = vllm_config.model_config.use_mla
        self.attn = self._latents(vllm_config) if self.keeps_latents else self.expanded(vllm_config)

    def _latents(self, vllm_config: VllmConfig) -> nn.ModuleList:
        sizes = (self.heads, self.scaling, self.nope, self.rope, self.value, self.config.q_lora_rank, self.latent)
        options = {"cache_config": vllm_config.cache_config, "quant_config": None}
        caches: list[LatentCache] = []
        for prefix in self.caches:
            first = caches[0] if caches else None
            caches.append(LatentCache(*sizes, self.kv_b_proj, first=first, prefix=prefix, **options))
        return nn.ModuleList(caches)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], loop: int = 0) -> Tensor:
        """x [tokens, dim] -> the same."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)[0]
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)[0]))[0]
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        q = torch.cat([q_nope, self.rotated(q_rope, tables)], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[0].split([self.latent, self.rope], dim=-1)
        latent, k_rope = self.kv_a_layernorm(latent), self.rotated(k_rope[:, None], tables)
        if self.keeps_latents:
            out = self.attn[loop](q, latent, k_rope, output_shape=(len(x), self.heads * self.value))
        else:
            out = self._over_heads(q, latent, k_rope, loop)
        return self.o_proj(out)[0]

    def _over_heads(self, q: Tensor, latent: Tensor, k_rope: Tensor, loop: int) -> Tensor:
        """Attention over keys and values of each head; values are padded to the keys' width, which the cache has."""
        each = self.kv_b_proj(latent)[0].unflatten(-1, (self.heads, -1))
        k_nope, v = each.split([self.nope, self.value], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1)], dim=-1)
        v = functional.pad(v, (0, self.head_dim - self.value))
        out = self.attn[loop](q.flatten(1), k.flatten(1), v.flatten(1))
        return out.unflatten(-1, (-1, self.head_dim))[..., : self.value].flatten(1)
