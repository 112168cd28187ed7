"""The recurrent-depth mixture-of-experts model in Hugging Face transformers; needs torch and transformers only.

h_0 = 0; h_{t+1} = A h_t + B e + Transformer(h_t, e) for t < n_loops, with the same weights in every loop; e is the
normed output of the prelude. State, injection, router and norms compute in fp32, whatever the weights' type.
"""

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_mythos import MythosConfig, filled
from .rotary_mythos import rotary_tables, rotate

_MIN_ROW_UPDATES = 100
_DECAY_CAP = {"float32": 1.0 - 1e-4, "bfloat16": 1.0 - 2.0**-8}
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this version of transformers calls the cache: in its own calls, and in outputs."""
_ATTENTION = frozenset(FlashAttentionKwargs.__annotations__) | frozenset(PagedAttentionArgs.__annotations__)
"""What transformers declares for attention: of packed sequences, and of continuous batching."""
_RECORDS = ("output_attentions", "output_hidden_states", "output_router_logits")


def attention_keywords(module: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that attention reads. Raises TypeError for an unknown one, which swallowed would go unnoticed,
    and ValueError for a record that the model does not keep."""
    for name in _RECORDS:
        wanted = given.pop(name, None)
        if wanted or (wanted is None and getattr(module.config, name, False)):
            raise ValueError(f"{type(module).__name__}: {name}: given True; allowed: False, the model keeps none")
    for name in given:
        if name not in _ATTENTION:
            known = sorted({*inspect.signature(module.forward).parameters, *_ATTENTION, *_RECORDS} - {"kwargs"})
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{type(module).__name__}: unknown argument {name!r}{meant} (allowed: {', '.join(known)})")
    return given


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, given by either name. Raises ValueError for two different ones."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values: given two caches; allowed: one, by either name")
    return past_key_values if cache is None else cache


class MythosContext(NamedTuple):
    """What attention needs beside the stream. keywords: what its implementation reads."""

    tables: tuple[Tensor, Tensor]
    mask: Any
    cache: Any
    keywords: dict[str, Any]


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

    def forward(self, x: Tensor, context: MythosContext, slot: int) -> Tensor:
        """x [batch, seq, dim] -> the same."""
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
        out, _ = attend(self, q, k, v, context.mask, dropout=0.0, scaling=self.scaling, **keywords)
        if self.latent:
            out = out[..., : self.value]
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())

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


class MythosMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@use_experts_implementation
class MythosExperts(nn.Module):
    """Routed experts, stacked; files hold them one by one."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.num_experts, hidden, dim = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, dim, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, dim], indices and weights [tokens, k] -> [tokens, dim]."""
        out = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            tokens, place = torch.where(indices == expert)
            gate, up = functional.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, tokens, rows * weights[tokens, place, None])
        return out


class MythosRouter(nn.Module):
    """Token-choice routing in fp32; the selection bias, shared and of each loop, does not enter the weights."""

    e_score_correction_bias: Tensor
    loop_correction_bias: Tensor
    loop_updates: Tensor

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("loop_correction_bias", torch.zeros(config.max_loops, experts))
        self.register_buffer("loop_updates", torch.zeros(config.max_loops))

    def forward(self, x: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """x [tokens, dim] -> indices int64 and weights fp32, both [tokens, k]."""
        logits = functional.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        # Loops deeper than any trained one use the last trained one's bias.
        trusted = ((self.loop_updates >= _MIN_ROW_UPDATES).sum() - 1).clamp_min(0).clamp_max(loop)
        bias = self.e_score_correction_bias + self.loop_correction_bias.index_select(0, trusted.view(-1))[0]
        choice = scores + bias.float()
        if self.config.n_group is not None and self.config.topk_group is not None:
            grouped = choice.unflatten(-1, (self.config.n_group, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = best.topk(self.config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
            choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        indices = choice.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, indices)
        return indices, weights / weights.sum(-1, keepdim=True).clamp_min(1e-20) * self.config.routed_scaling_factor


class MythosMoE(nn.Module):
    """Routed and shared experts."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.router = MythosRouter(config)
        self.experts = MythosExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * filled(config.shared_expert_intermediate_size)
            self.shared_experts = MythosMLP(config.hidden_size, width)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        rows = x.flatten(0, -2)
        indices, weights = self.router(rows, loop)
        routed = self.experts(rows, indices, weights.to(rows.dtype)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class MythosLayer(nn.Module):
    """A layer: dense outside the loop (loop=None), with experts and an fp32 stream inside; `index` counts through
    prelude, block and coda."""

    def __init__(self, config: MythosConfig, looped: bool, index: int):
        super().__init__()
        add_norms(self, config)
        self.self_attn = MythosAttention(config, index)
        self.mlp = MythosMoE(config) if looped else MythosMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: MythosContext, slot: int, loop: int | None = None) -> Tensor:
        own = () if loop is None else (loop,)
        return residual(self, x, lambda x: self.self_attn(x, context, slot), lambda x: self.mlp(x, *own))


def add_norms(layer: Any, config: MythosConfig) -> None:
    """Gives a layer its two norms: before attention and feed-forward, or after them, as in OLMo 2."""
    after = layer.norms_after = config.norm_placement == "after"
    for name in ("post_attention_layernorm", "post_feedforward_layernorm" if after else "input_layernorm"):
        setattr(layer, name, MythosRMSNorm(config.hidden_size, config.rms_norm_eps))


def residual(layer: Any, x: Tensor, attend: Callable[[Tensor], Tensor], mix: Callable[[Tensor], Tensor]) -> Tensor:
    """The stream x [..., dim] after a layer with `add_norms`'s norms, of its attention and feed-forward."""
    if layer.norms_after:
        dtype = layer.post_attention_layernorm.weight.dtype  # an fp32 stream meets branches of the weights' type
        x = x + layer.post_attention_layernorm(attend(x.to(dtype)))
        return x + layer.post_feedforward_layernorm(mix(x.to(dtype)))
    x = x + attend(layer.input_layernorm(x))
    return x + mix(layer.post_attention_layernorm(x))


class MythosInjection(nn.Module):
    """A h + B e, diagonal, in fp32: A = exp(-dt exp(log_A)) with dt = softplus(dt_bias)."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.discretisation = config.discretisation
        self.state_dtype = getattr(torch, config.state_dtype)
        self.least = math.log(-math.log(_DECAY_CAP[config.state_dtype]) * 1.002)
        self.log_A = nn.Parameter(torch.zeros(config.hidden_size))
        if config.discretisation == "direct":
            self.log_dt = nn.Parameter(torch.zeros(1))
        else:
            self.dt_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.B = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        if self.discretisation == "direct":
            rate = (self.log_dt.float() + self.log_A.float()).clamp(-20.0, 20.0).exp()
            gain = self.B.float()
        else:
            bias = self.dt_bias.float()
            dt = functional.softplus(bias)
            log_dt = torch.where(bias < -16.0, bias, dt.clamp_min(1e-30).log())
            rate = (log_dt + self.log_A.float()).clamp(self.least, math.log(30.0)).exp()
            step = dt if self.discretisation == "euler" else dt * (-torch.expm1(-rate) / rate)
            gain = step * self.B.float()
        decay = torch.exp(-rate).to(self.state_dtype)
        return (decay * h).float() + gain * e.float()


class MythosLoopEmbedding(nn.Module):
    """A sinusoid of the loop index: with a learned gain and held at the mean recurrence, or raw on an eighth."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.dim, self.last = config.hidden_size, config.mean_recurrence - 1
        self.gain = nn.Parameter(torch.zeros(self.dim)) if config.loop_embedding == "scaled" else None

    def forward(self, loop: int, device: torch.device) -> Tensor:
        width = self.dim // 8 if self.gain is None else self.dim
        index = loop if self.gain is None else min(loop, self.last)
        exponent = torch.arange(0, width, 2, device=device).float() / width
        angle = index * torch.pow(torch.full_like(exponent, 10000.0), -exponent)
        table = torch.cat([angle.sin(), angle.cos()])[:width]
        return functional.pad(table, (0, self.dim - width)) if self.gain is None else self.gain.float() * table


class MythosLoRA(nn.Module):
    """up(scale[loop] * down(x)); loops beyond the table use its last row."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.eps = config.rms_norm_eps if config.lora_target == "input" else None
        self.down = nn.Linear(config.hidden_size, config.lora_rank, bias=False)
        self.up = nn.Linear(config.lora_rank, config.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(config.max_loops, config.lora_rank))

    def forward(self, x: Tensor, loop: int) -> Tensor:
        dtype = self.down.weight.dtype
        inner = (x if self.eps is None else rms(x, self.eps)).to(dtype)
        return self.up(self.down(inner) * self.scale[min(loop, len(self.scale) - 1)].to(dtype))


class MythosRecurrentBlock(nn.Module):
    """The looped layers with what tells them the loop and feeds e in. `layers`: those of another engine."""

    def __init__(self, config: MythosConfig, layers: list[nn.Module] | None = None):
        super().__init__()
        self.config = config
        self.injection = MythosInjection(config)
        self.loop_embedding = MythosLoopEmbedding(config) if config.loop_embedding != "none" else None
        self.lora = MythosLoRA(config) if config.lora_rank else None
        self.norm = MythosRMSNorm(config.hidden_size, config.rms_norm_eps) if config.injection == "post" else None
        first, count = config.num_prelude_layers, config.num_recurrent_layers
        own = layers or [MythosLayer(config, looped=True, index=first + i) for i in range(count)]
        self.layers = nn.ModuleList(own)

    def run_layers(self, x: Tensor, loop: int, context: Any) -> Tensor:
        """The layers once, [batch, seq, dim]; each (loop, layer) has a slot of the cache."""
        for index, layer in enumerate(self.layers):
            slot = self.config.num_prelude_layers + self.config.num_coda_layers + loop * len(self.layers) + index
            x = layer(x, context, slot, loop)
        return x

    def forward(self, e: Tensor, n_loops: int, context: Any) -> Tensor:
        """e [batch, seq, dim] -> h after n_loops, fp32. context: what the layers take, MythosContext for one's own."""
        config, dtype = self.config, getattr(torch, self.config.state_dtype)
        h = e.to(dtype) if config.initial_state == "embedding" else torch.zeros_like(e, dtype=dtype)
        for loop in range(n_loops):
            injected = self.injection(h, e)
            x = h if self.norm is not None else injected
            if self.loop_embedding is not None:
                x = x + self.loop_embedding(loop, x.device)
            if self.norm is not None:
                x = self.norm(x + e).float()
            if self.lora is not None and config.lora_target == "input":
                x = x + self.lora(x, loop)
            x = self.run_layers(x, loop, context)
            if self.lora is not None and config.lora_target == "output":
                x = x + self.lora(x, loop)
            h = (x if self.norm is None else injected + x).to(dtype)
        return h.float()


class MythosPreTrainedModel(PreTrainedModel):
    """What both classes share: loading that refuses incomplete files."""

    config: MythosConfig
    config_class = MythosConfig
    base_model_prefix = "model"
    _no_split_modules = ["MythosLayer", "MythosRecurrentBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["router", "injection", "loop_embedding"]
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def _grouped_mm_can_dispatch(self) -> bool:
        """torch's grouped matmul wants rows of whole 16-byte units; experts of other widths are computed one by one."""
        if self.config.hidden_size % 8 or self.config.moe_intermediate_size % 8:
            raise ValueError("grouped_mm: needs hidden_size and moe_intermediate_size to be multiples of 8")
        return super()._grouped_mm_can_dispatch()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MythosExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MythosRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in (module.e_score_correction_bias, module.loop_correction_bias, module.loop_updates):
                init.zeros_(buffer)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a tensor that is missing, unknown or of another shape is an error: transformers would
        leave it random and print a report."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        faults = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
        if faults:
            shown = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in faults.items())
            raise ValueError(f"{args[0] if args else cls.__name__}: not a whole model: {shown}")
        return (model, info) if output_loading_info else model


class MythosModel(MythosPreTrainedModel):
    """The model without its head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        prelude, coda = config.num_prelude_layers, config.num_coda_layers
        self.prelude = nn.ModuleList([MythosLayer(config, looped=False, index=i) for i in range(prelude)])
        self.prelude_norm = MythosRMSNorm(dim, eps) if config.prelude_norm else None
        self.recurrent = MythosRecurrentBlock(config)
        last = prelude + config.num_recurrent_layers
        self.coda = nn.ModuleList([MythosLayer(config, looped=False, index=last + i) for i in range(coda)])
        self.norm = MythosRMSNorm(dim, eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | None = None,
        return_dict: bool | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids int64 [batch, seq], or inputs_embeds [batch, seq, dim] -> the last hidden state [batch, seq, dim].

        n_loops: how often the block runs (None: the configuration's). cache and past_key_values: one thing by the names
        of all versions. kwargs: what transformers declares for attention. Raises ValueError for n_loops below 1, for
        two caches and for anything but one input, TypeError for an unknown argument.
        """
        config, keywords = self.config, attention_keywords(self, kwargs)
        entries = one_cache(cache, past_key_values)
        n_loops = filled(config.n_loops) if n_loops is None else int(n_loops)
        if n_loops < 1:
            raise ValueError(f"n_loops: given {n_loops}; allowed: 1 or more")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"input_ids, inputs_embeds: {'none' if input_ids is None else 'both'} given; allowed: one")
        if keywords.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("position_ids: not given; cu_seq_lens_q needs those of each sequence")
        if keywords.get("is_causal") is False and getattr(attention_mask, "ndim", 0) != 4:
            raise ValueError("is_causal: given False; allowed: True, unless attention_mask has 4 dimensions")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if isinstance(entries, PagedAttentionCache) and _CACHE != "cache":
            # Up to 5.23 the attention itself writes continuous batching's cache.
            keywords["cache"], entries = entries, None
            use_cache = False
        if position_ids is None:
            seen = entries.get_seq_length() if entries is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: entries},  # not the empty one below, with which packed sequences would see each other
        )
        if entries is None and (config.use_cache if use_cache is None else use_cache):
            entries = DynamicCache()  # made without the configuration, it grows with the loops
        tables = rotary_tables(position_ids, config)
        context = MythosContext(tables, mask, entries, keywords)
        for slot, layer in enumerate(self.prelude):
            x = layer(x, context, slot)
        e = x if self.prelude_norm is None else self.prelude_norm(x)
        x = self.recurrent(e, n_loops, context).to(e.dtype)
        for slot, layer in enumerate(self.coda, len(self.prelude)):
            x = layer(x, context, slot)
        out = BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{_CACHE: entries})
        return out if _as_mapping(self, return_dict) else out.to_tuple()


def _as_mapping(module: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(module.config.return_dict if return_dict is None else return_dict)


class MythosForCausalLM(MythosPreTrainedModel, GenerationMixin):
    """The language model; `generate(..., n_loops=8)` runs the block eight times per token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True
    """To trainers that accumulate: the loss of a part is over the items of the whole batch (num_items_in_batch)."""

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.model = MythosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """fp32 logits [batch, seq, vocab], or those of logits_to_keep; with labels int64 [batch, seq] also the mean
        loss of the next tokens, or their sum over num_items_in_batch, with which trainers accumulate. The rest is as in
        MythosModel."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            n_loops=n_loops,
            return_dict=True,
            cache=one_cache(cache, past_key_values),
            **attention_keywords(self, kwargs),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :]).float()
        loss = None
        if labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **sizes)
        whole = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: out.get(_CACHE)})
        return whole if _as_mapping(self, return_dict) else whole.to_tuple()

    def generate(self, *args, n_loops: int | None = None, cache=None, past_key_values=None, **kwargs):
        """As in transformers, at any loop count: one prompt's cache holds what n_loops loops need. The cache may be
        given by either name."""
        cache = one_cache(cache, past_key_values)
        if n_loops is not None:
            settings = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or self.generation_config
            use_cache = kwargs.get("use_cache", settings.use_cache)
            kind = kwargs.get("cache_implementation", settings.cache_implementation)
            if kind is not None and n_loops > filled(self.config.n_loops):
                raise ValueError(
                    f"n_loops: given {n_loops}; allowed with cache_implementation {kind!r}: up to the configuration's "
                    f"{self.config.n_loops}; model.config.n_loops = {n_loops} makes room"
                )
            if n_loops != self.config.n_loops and use_cache is not False and cache is None and kind is None:
                # A cache made from the configuration has as many entries as that has loops.
                cache = DynamicCache()
            kwargs["n_loops"] = n_loops
        if cache is not None:
            kwargs[_CACHE] = cache
        return super().generate(*args, **kwargs)


# Files hold experts one by one. Registered here, where loading needs it: without it experts would stay random.
register_checkpoint_conversion_mapping("mythos", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)

__all__ = ["MythosForCausalLM", "MythosModel", "MythosPreTrainedModel"]
