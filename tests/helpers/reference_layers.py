"""Layers of the reference model: attention, dense and mixture-of-experts feed-forward. See `reference.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.config.schema import ModelConfig

Params = dict[str, Tensor]


@dataclass
class Pass:
    """What one forward collects beside the logits; counts: layer -> one [n_experts] tensor per loop."""

    balance: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    ponder: Tensor | None = None
    counts: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Rotation angles and visibility of keys, shared by all attention layers."""

    positions: Tensor  # [batch, seq]
    visible: Tensor  # [batch, 1, seq (query), seq (key)]


@dataclass
class Loop:
    """One turn of the recurrent block: its index, running positions [batch, seq], keys and values kept so far."""

    index: int
    alive: Tensor
    kept: dict[int, tuple[Tensor, Tensor]]
    has_gradient: bool


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def swiglu(params: Params, prefix: str, x: Tensor) -> Tensor:
    """w2(silu(w1 x) * w3 x)."""
    hidden = functional.silu(x @ params[f"{prefix}.w1.weight"].T) * (x @ params[f"{prefix}.w3.weight"].T)
    return hidden @ params[f"{prefix}.w2.weight"].T


def rope(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Rotates x [batch, seq, heads, d] by position * theta^(-2i/d); pairs are (i, i + d/2) or (2i, 2i + 1)."""
    d = x.shape[-1]
    frequency = config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    stretched, factor = stretch(frequency.tolist(), config)
    angle = (positions[:, :, None, None].double() * torch.tensor(stretched, dtype=torch.float64)).to(x.device)
    cos, sin = factor * angle.cos().to(x.dtype), factor * angle.sin().to(x.dtype)
    if config.rope_interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def stretch(frequencies: list[float], config: ModelConfig) -> tuple[list[float], float]:
    """The frequencies after model.rope_scaling, wave by wave, and the factor on rotated vectors."""
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    s, length = scaling.factor, scaling.original_max_position_embeddings or 0
    if scaling.rope_type == "linear":
        return [w / s for w in frequencies], 1.0
    stretched = []
    for i, w in enumerate(frequencies):
        turns = length * w / (2 * math.pi)
        if scaling.rope_type == "llama3":
            low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        else:
            # The (fractional) index of the wave that turns so often: theta^(2i/d) = length / (2 pi turns).
            fast, slow = (
                len(frequencies) * math.log(length / (2 * math.pi * often)) / math.log(config.rope_theta)
                for often in (scaling.beta_fast or 32, scaling.beta_slow or 1)
            )
            first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * len(frequencies) - 1)
            kept = 1 - min(max((i - first) / (last - first), 0.0), 1.0)
        stretched.append(kept * w + (1 - kept) * w / s)
    yarn = 1 + 0.1 * math.log(s) if scaling.attention_factor is None else scaling.attention_factor
    return stretched, yarn if scaling.rope_type == "yarn" else 1.0


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v for [batch, seq, heads, d] tensors; heads are concatenated: [batch, seq, heads * d]."""
    score = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weight = torch.softmax(score.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weight, value).flatten(2)


def keep_halted(new: tuple[Tensor, Tensor], layer: int, loop: Loop | None) -> tuple[Tensor, Tensor]:
    """Keys and values of this loop for running positions, those of the last active loop for halted ones."""
    if loop is None:
        return new
    if layer in loop.kept:
        kept = loop.kept[layer]
        pick = [loop.alive.reshape(*loop.alive.shape, *[1] * (tensor.dim() - 2)) for tensor in new]
        new = (torch.where(pick[0], new[0], kept[0]), torch.where(pick[1], new[1], kept[1]))
    loop.kept[layer] = new
    return new


def gqa(params: Params, prefix: str, config: ModelConfig, x: Tensor, inputs: Inputs, kv_hook: Callable) -> Tensor:
    """Grouped-query attention."""
    d, heads, kv_heads = config.resolved_head_dim, config.n_heads, config.resolved_kv_heads
    query, key, value = (affine(params, f"{prefix}.{name}", x) for name in "qkv")
    if config.qk_norm and config.qk_norm_span == "all":
        query = rms_norm(query, config.norm_eps, params[f"{prefix}.q_norm.weight"])
        key = rms_norm(key, config.norm_eps, params[f"{prefix}.k_norm.weight"])
    query, key, value = (part.unflatten(-1, (-1, d)) for part in (query, key, value))
    if config.qk_norm and config.qk_norm_span == "head":
        query = rms_norm(query, config.norm_eps, params[f"{prefix}.q_norm.weight"])
        key = rms_norm(key, config.norm_eps, params[f"{prefix}.k_norm.weight"])
    if has_rope(prefix, config):
        query, key = rope(query, inputs.positions, config), rope(key, inputs.positions, config)
    key, value = kv_hook((key, value))
    key = key.repeat_interleave(heads // kv_heads, dim=2)
    value = value.repeat_interleave(heads // kv_heads, dim=2)
    return affine(params, f"{prefix}.o", attend(query, key, value, inputs.visible, d**-0.5))


def has_rope(prefix: str, config: ModelConfig) -> bool:
    """Whether the layer of e.g. "coda.1.attn" is not among those listed without."""
    part, number = prefix.split(".")[0], int(prefix.split(".")[-2])
    order = {"prelude": config.prelude_layers, "recurrent": config.recurrent_layers, "coda": config.coda_layers}
    before = sum(list(order.values())[: list(order).index(part)])
    return before + number not in config.no_rope_layers


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    """W x, plus b where there is one."""
    return x @ params[f"{name}.weight"].T + params.get(f"{name}.bias", 0.0)


def mla(params: Params, prefix: str, config: ModelConfig, x: Tensor, inputs: Inputs, kv_hook: Callable) -> Tensor:
    """Multi-head latent attention (DeepSeek-V2, eq. 9-19), without absorption."""
    heads, nope, width, value_width = (
        config.n_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    assert nope is not None
    assert width is not None
    assert value_width is not None
    if config.q_lora_rank is None:
        query = x @ params[f"{prefix}.q_proj.weight"].T
    else:
        latent = x @ params[f"{prefix}.q_down.weight"].T
        query = rms_norm(latent, config.norm_eps, params[f"{prefix}.q_norm.weight"])
        query = query @ params[f"{prefix}.q_up.weight"].T
    query = query.unflatten(-1, (heads, nope + width))
    query = torch.cat([query[..., :nope], rope(query[..., nope:], inputs.positions, config)], dim=-1)

    down = x @ params[f"{prefix}.kv_down.weight"].T
    latent = rms_norm(down[..., : config.kv_lora_rank], config.norm_eps, params[f"{prefix}.kv_norm.weight"])
    key_rope = rope(down[..., None, config.kv_lora_rank :], inputs.positions, config)
    latent, key_rope = kv_hook((latent, key_rope))
    up = (latent @ params[f"{prefix}.kv_up.weight"].T).unflatten(-1, (heads, nope + value_width))
    key = torch.cat([up[..., :nope], key_rope.expand(-1, -1, heads, -1)], dim=-1)
    mixed = attend(query, key, up[..., nope:], inputs.visible, (nope + width) ** -0.5)
    return mixed @ params[f"{prefix}.o.weight"].T


def attention(
    params: Params,
    prefix: str,
    config: ModelConfig,
    x: Tensor,
    inputs: Inputs,
    layer: int = -1,
    loop: Loop | None = None,
) -> Tensor:
    """Either attention on normed x [batch, seq, dim]."""
    kind = mla if config.attn_type == "mla" else gqa
    return kind(params, prefix, config, x, inputs, lambda new: keep_halted(new, layer, loop))


def dense_layer(params: Params, prefix: str, config: ModelConfig, x: Tensor, inputs: Inputs) -> Tensor:
    """A layer of prelude or coda."""
    x = branch(
        params, f"{prefix}.attn_norm", config, x, lambda x: attention(params, f"{prefix}.attn", config, x, inputs)
    )
    return branch(params, f"{prefix}.ffn_norm", config, x, lambda x: swiglu(params, f"{prefix}.ffn", x))


def branch(params: Params, norm: str, config: ModelConfig, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """x + f(norm(x)), or x + norm(f(x))."""
    weight = params[f"{norm}.weight"]
    if config.norm_placement == "after":
        return x + rms_norm(compute(x), config.norm_eps, weight)
    return x + compute(rms_norm(x, config.norm_eps, weight))


def selection_bias(router_bias: Params | None, prefix: str, loop: int) -> Tensor | float:
    """b[e] + r[min(t, t_seen)][e]; t_seen is the last row with at least 100 updates."""
    if router_bias is None:
        return 0.0
    bias = router_bias.get(f"{prefix}.bias", torch.zeros(()))
    rows, updates = router_bias.get(f"{prefix}.loop_bias"), router_bias.get(f"{prefix}.loop_updates")
    if rows is None or updates is None:
        return bias
    seen = [row for row, count in enumerate(updates.tolist()) if count >= 100]
    return bias + rows[min(loop, seen[-1] if seen else 0)]


def limit_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """-inf outside the best `n_limited_groups` groups; a group's score is the sum of its two best choices."""
    if config.n_expert_groups is None:
        return choice
    grouped = choice.unflatten(-1, (config.n_expert_groups, -1))
    score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = score.topk(config.n_limited_groups, dim=-1).indices
    allowed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, chosen, True)
    return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)


def moe(
    params: Params,
    prefix: str,
    config: ModelConfig,
    x: Tensor,
    layer: int,
    loop: Loop,
    router_bias: Params | None,
    out: Pass,
) -> Tensor:
    """Routed and shared experts on normed x [batch, seq, dim]; adds this loop's losses and counts to `out`."""
    logits = x @ params[f"{prefix}.router.weight"].T
    score = torch.sigmoid(logits) if config.router_score == "sigmoid" else torch.softmax(logits, dim=-1)
    choice = score.detach() + selection_bias(router_bias, f"{prefix}.router", loop.index)
    chosen = limit_groups(choice, config).topk(config.n_experts_per_tok, dim=-1).indices
    picked = torch.zeros_like(score).scatter(-1, chosen, 1.0)  # [batch, seq, n_experts], 0 or 1
    weight = config.route_scale * score * picked / (score * picked).sum(-1, keepdim=True)

    result = torch.zeros_like(x)
    for expert in range(config.n_experts):
        tokens = picked[..., expert] > 0
        w1, w2, w3 = (params[f"{prefix}.experts.{name}"][expert] for name in ("w1", "w2", "w3"))
        hidden = functional.silu(x[tokens] @ w1.T) * (x[tokens] @ w3.T)
        result[tokens] = result[tokens] + weight[..., expert][tokens][:, None] * (hidden @ w2.T)
    if config.n_shared_experts:
        result = result + swiglu(params, f"{prefix}.shared_experts", x)

    out.counts.setdefault(layer, []).append(picked[loop.alive].sum(0).detach())
    if loop.has_gradient:
        out.balance.append(balance_loss(score, picked, loop.alive, config))
        running = torch.logsumexp(logits, dim=-1)[loop.alive]
        out.z.append(running.pow(2).sum() / max(1, running.numel()))
    return result


def balance_loss(score: Tensor, picked: Tensor, alive: Tensor, config: ModelConfig) -> Tensor:
    """Sequence-wise balance loss (DeepSeek-V3, eq. 17-20) over the running positions of each sequence."""
    share = score / score.sum(-1, keepdim=True)
    losses = []
    for s in range(score.shape[0]):
        running = alive[s]
        length = max(1, int(running.sum()))
        frequency = picked[s][running].sum(0) * config.n_experts / (config.n_experts_per_tok * length)
        losses.append((frequency.detach() * share[s][running].sum(0) / length).sum())
    return torch.stack(losses).mean()
