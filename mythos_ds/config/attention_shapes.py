"""Sizes of one attention, from the configuration alone."""

from mythos_ds.config.schema import ModelConfig


def attention_matmul(model: ModelConfig) -> int:
    """Matrix elements of one attention."""
    dim, heads = model.dim, model.n_heads
    if model.attn_type == "gqa":
        return 2 * dim * model.resolved_head_dim * (heads + model.resolved_kv_heads)
    kv_lora, nope, rope, value = mla_widths(model)
    key = nope + rope
    query = dim * heads * key if model.q_lora_rank is None else model.q_lora_rank * (dim + heads * key)
    return query + dim * (kv_lora + rope) + kv_lora * heads * (nope + value) + heads * value * dim


def mla_widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim. Raises ValueError where one is not given."""
    widths = (model.kv_lora_rank, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)
    if any(width is None for width in widths):
        raise ValueError("attn_type 'mla' needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim")
    kv_lora, nope, rope, value = (int(width or 0) for width in widths)
    return kv_lora, nope, rope, value
