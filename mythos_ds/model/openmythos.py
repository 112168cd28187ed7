"""Runs OpenMythos weights (open-mythos 0.5.0) exactly: its configuration and its state_dict, in our terms.

The map is data: each row names the source tensors of one target and how they are joined. All joins are linear, so the
same map carries gradients over.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import CheckpointError

Join = Callable[[list[Tensor], ModelConfig], Tensor]


def _copy(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return parts[0].clone()


def _flat(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return parts[0].flatten()


def _transpose(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return parts[0].t().contiguous()


def _stack(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.stack(parts)


def _rows(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(parts, dim=0)


def _columns(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(parts, dim=1)


def _heads(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Per head, the rows without RoPE and then those with it."""
    return torch.cat([part.unflatten(0, (config.n_heads, -1)) for part in parts], dim=1).flatten(0, 1)


Row = tuple[str, tuple[str, ...], Join]

_NORMS: tuple[Row, ...] = (
    ("attn_norm.weight", ("attn_norm.weight",), _copy),
    ("ffn_norm.weight", ("ffn_norm.weight",), _copy),
)
_ATTENTION: dict[str, tuple[Row, ...]] = {
    "mla": (
        ("attn.q_down.weight", ("attn.q_down.weight",), _copy),
        ("attn.q_norm.weight", ("attn.q_norm.weight",), _copy),
        ("attn.q_up.weight", ("attn.q_up_nope.weight", "attn.q_up_rope.weight"), _heads),
        ("attn.kv_down.weight", ("attn.kv_down.weight",), _copy),
        ("attn.kv_norm.weight", ("attn.kv_norm.weight",), _copy),
        ("attn.kv_up.weight", ("attn.kv_up.weight",), _copy),
        ("attn.o.weight", ("attn.wo.weight",), _copy),
    ),
    "gqa": (
        ("attn.q.weight", ("attn.wq.weight",), _copy),
        ("attn.k.weight", ("attn.wk.weight",), _copy),
        ("attn.v.weight", ("attn.wv.weight",), _copy),
        ("attn.o.weight", ("attn.wo.weight",), _copy),
    ),
}
_FEED_FORWARD: tuple[Row, ...] = (
    ("ffn.w1.weight", ("ffn.gate.weight",), _copy),
    ("ffn.w3.weight", ("ffn.up.weight",), _copy),
    ("ffn.w2.weight", ("ffn.down.weight",), _copy),
)
_MOE: tuple[Row, ...] = (
    ("moe.router.weight", ("ffn.router.weight",), _copy),
    ("moe.experts.w1", ("ffn.routed_experts.{expert}.gate.weight",), _stack),
    ("moe.experts.w3", ("ffn.routed_experts.{expert}.up.weight",), _stack),
    ("moe.experts.w2", ("ffn.routed_experts.{expert}.down.weight",), _stack),
    ("moe.shared_experts.w1.weight", ("ffn.shared_experts.{shared}.gate.weight",), _rows),
    ("moe.shared_experts.w3.weight", ("ffn.shared_experts.{shared}.up.weight",), _rows),
    ("moe.shared_experts.w2.weight", ("ffn.shared_experts.{shared}.down.weight",), _columns),
)
_LOOP: tuple[Row, ...] = (
    ("recurrent.injection.log_A", ("recurrent.injection.log_A",), _copy),
    ("recurrent.injection.log_dt", ("recurrent.injection.log_dt",), _copy),
    ("recurrent.injection.B", ("recurrent.injection.B",), _copy),
    ("recurrent.halting.weight", ("recurrent.act.halt.weight",), _flat),
    ("recurrent.halting.bias", ("recurrent.act.halt.bias",), _copy),
    ("recurrent.lora.down.weight", ("recurrent.lora.down.weight",), _copy),
    ("recurrent.lora.up.weight", ("recurrent.lora.B",), _transpose),
    ("recurrent.lora.scale", ("recurrent.lora.scale.weight",), _copy),
    ("recurrent.norm.weight", ("recurrent.norm.weight",), _copy),
    ("embed.weight", ("embed.weight",), _copy),
    ("norm.weight", ("norm.weight",), _copy),
)


def openmythos_config(source: Any) -> ModelConfig:
    """The configuration that computes what an open-mythos `MythosConfig` computes (dropout aside)."""
    mla = source.attn_type == "mla"
    attention: dict[str, Any] = {"n_kv_heads": source.n_kv_heads}
    if mla:
        names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        attention = {name: getattr(source, name) for name in names}
    return ModelConfig(
        **attention,
        attn_type="mla" if mla else "gqa",
        vocab_size=source.vocab_size,
        dim=source.dim,
        n_heads=source.n_heads,
        prelude_layers=source.prelude_layers,
        recurrent_layers=1,
        coda_layers=source.coda_layers,
        max_loops=source.max_loop_iters,
        mean_recurrence=source.max_loop_iters,
        rope_theta=float(source.rope_theta),
        rope_interleaved=True,
        ffn_dim=source.dim * 4 // 3,
        n_experts=source.n_experts,
        n_experts_per_tok=source.n_experts_per_tok,
        expert_dim=source.expert_dim,
        n_shared_experts=source.n_shared_experts,
        shared_expert_dim=source.expert_dim * source.n_experts_per_tok,
        router_score="softmax",
        injection="post",
        discretisation="direct",
        initial_state="embedding",
        prelude_norm=False,
        loop_embedding="raw",
        lora_rank=source.lora_rank,
        lora_target="output",
        halting="act_openmythos",
        act_threshold=source.act_threshold,
        tie_embeddings=True,
        norm_eps=1e-6,
    )


def convert_openmythos(source: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """An open-mythos state_dict (or its gradients by the same names) under our parameter names.

    `lm_head.weight` is the tied `embed.weight` and is not listed. Raises CheckpointError where a tensor is missing, or
    where a router bias is set: theirs shifts logits, ours scores (their training never moves it from zero).
    """
    bias = source.get("recurrent.block.ffn.router_bias")
    if bias is not None and bool(bias.any()):
        raise CheckpointError(
            "recurrent.block.ffn.router_bias: nonzero values act on logits in OpenMythos and on scores here; "
            "only a zero bias (what OpenMythos trains) can be converted"
        )
    rows = [*_rows_of_layers(config), *_LOOP]
    return {target: join([_tensor(source, name) for name in names], config) for target, names, join in rows}


def _rows_of_layers(config: ModelConfig) -> list[Row]:
    attention = _ATTENTION[config.attn_type]
    layers = [(f"{part}.{i}",) * 2 for part in ("prelude", "coda") for i in range(getattr(config, f"{part}_layers"))]
    rows = [
        (f"{ours}.{target}", tuple(f"{theirs}.{name}" for name in names), join)
        for theirs, ours in layers
        for target, names, join in (*_NORMS, *attention, *_FEED_FORWARD)
    ]
    for target, names, join in (*_NORMS, *attention, *_MOE):
        sources = tuple(f"recurrent.block.{each}" for name in names for each in _expand(name, config))
        if sources:
            rows.append((f"recurrent.layers.0.{target}", sources, join))
    return rows


def _expand(name: str, config: ModelConfig) -> list[str]:
    if "{expert}" in name:
        return [name.format(expert=i) for i in range(config.n_experts)]
    if "{shared}" in name:
        return [name.format(shared=i) for i in range(config.n_shared_experts)]
    return [name]


def _tensor(source: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in source:
        raise CheckpointError(f"{name}: not in the given OpenMythos weights")
    return source[name]
