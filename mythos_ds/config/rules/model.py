"""Rules between the settings of the model: each returns what is wrong with one key, or None."""

from mythos_ds.config.attention_shapes import attention_matmul
from mythos_ds.config.divisors import nearest_divisors
from mythos_ds.config.schema import ModelConfig, RopeScaling
from mythos_ds.errors import coded

MAX_PARAMETERS = 10**16
"""Above it, sizes of tensors in bytes leave 64 bits once batches are multiplied in."""
SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""What a kind of RoPE scaling needs beside its factor, and what it may have."""


@coded("MDS224")
def loop_embedding_width(model: ModelConfig) -> str | None:
    """The "scaled" sinusoid has pairs over all channels; the "raw" one, over an eighth, drops a last cosine."""
    unit = 2 if model.loop_embedding == "scaled" else 1
    if model.dim % unit == 0:
        return None
    nearest = round(model.dim / unit) * unit or unit
    return (
        f'{model.dim} given; allowed: multiples of {unit} with loop_embedding "{model.loop_embedding}"; '
        f"nearest: {nearest}"
    )


@coded("MDS214")
def kv_heads(model: ModelConfig) -> str | None:
    if model.attn_type != "gqa" or model.n_heads % model.resolved_kv_heads == 0:
        return None
    return (
        f"{model.n_kv_heads} given; allowed: divisors of n_heads = {model.n_heads}; "
        f"nearest: {nearest_divisors(model.resolved_kv_heads, model.n_heads)}"
    )


@coded("MDS215")
def head_dim(model: ModelConfig) -> str | None:
    if model.attn_type != "gqa":
        return None
    if model.head_dim is None and model.dim % model.n_heads:
        return f"missing; required where n_heads = {model.n_heads} does not divide dim = {model.dim}"
    width = model.resolved_head_dim
    return f"{width} given; allowed: even numbers (RoPE rotates pairs); nearest: {width + 1}" if width % 2 else None


@coded("MDS212")
def rope_scaling(model: ModelConfig) -> str | None:
    """Each kind has keys of its own; a key of another would do nothing."""
    if model.rope_scaling is None:
        return None
    if model.attn_type == "mla":
        return 'given; allowed with attn_type "mla": null (its softmax scale would follow from it); nearest: null'
    return scaling_problem(model.rope_scaling)


def scaling_problem(scaling: RopeScaling) -> str | None:
    """What is wrong with the keys of a RoPE scaling, or None."""
    kind, given = scaling.rope_type, scaling.model_dump(exclude_none=True)
    needed, optional = SCALING_KEYS[kind]
    if missing := [key for key in needed if key not in given]:
        return f'{missing[0]} is missing; required with rope_type "{kind}"'
    if idle := sorted(set(given) - {"rope_type", "factor", *needed, *optional}):
        allowed = ", ".join(("factor", *needed, *optional))
        return f'{idle[0]} has no effect with rope_type "{kind}"; allowed: {allowed}'
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        return f"high_freq_factor {given['high_freq_factor']} given; allowed: above low_freq_factor"
    scales = [key for key in ("mscale", "mscale_all_dim") if key in given]
    if scales and "attention_factor" in given:
        return f"{scales[0]} has no effect beside attention_factor; remove it"
    return f"{scales[0]} has no effect alone; allowed: mscale and mscale_all_dim together" if len(scales) == 1 else None


@coded("MDS210")
def qk_norm(model: ModelConfig) -> str | None:
    if not model.qk_norm or model.attn_type != "mla":
        return None
    return 'true given; allowed: false with attn_type "mla" (its latents are normed)'


@coded("MDS213")
def no_rope_layers(model: ModelConfig) -> str | None:
    n_layers, given = model.prelude_layers + model.recurrent_layers + model.coda_layers, list(model.no_rope_layers)
    if given == sorted(set(given)) and all(0 <= layer < n_layers for layer in given):
        return None
    nearest = sorted({layer for layer in given if 0 <= layer < n_layers})
    return f"{given} given; allowed: rising numbers from 0 to {n_layers - 1}; nearest: {nearest}"


@coded("MDS216")
def rope_dim(model: ModelConfig) -> str | None:
    width = model.qk_rope_head_dim
    if width is None or width % 2 == 0:
        return None
    return f"{width} given; allowed: even numbers (RoPE rotates pairs); nearest: {width - 1} or {width + 1}"


@coded("MDS217")
def top_k(model: ModelConfig) -> str | None:
    top_k, n_experts = model.n_experts_per_tok, model.n_experts
    if top_k > n_experts:
        return f"{top_k} given; allowed: at most n_experts = {n_experts}; nearest: {n_experts}"
    if model.n_expert_groups is None or model.n_limited_groups is None or n_experts % model.n_expert_groups:
        return None
    reachable = n_experts // model.n_expert_groups * model.n_limited_groups
    if top_k > reachable:
        return f"{top_k} given; allowed: at most the {reachable} experts of {model.n_limited_groups} groups"
    return None


@coded("MDS218")
def groups(model: ModelConfig) -> str | None:
    groups = model.n_expert_groups
    if groups is None:
        return "missing; required with n_limited_groups" if model.n_limited_groups is not None else None
    if model.n_experts % groups == 0:
        return None
    return (
        f"{groups} given; allowed: divisors of n_experts = {model.n_experts}; "
        f"nearest: {nearest_divisors(groups, model.n_experts)}"
    )


@coded("MDS219")
def limited_groups(model: ModelConfig) -> str | None:
    groups, limited = model.n_expert_groups, model.n_limited_groups
    if groups is None:
        return None
    if limited is None:
        return "missing; required with n_expert_groups"
    return f"{limited} given; allowed: 1 to n_expert_groups = {groups}" if limited > groups else None


@coded("MDS221")
def mean_recurrence(model: ModelConfig) -> str | None:
    if model.mean_recurrence <= model.max_loops:
        return None
    limit = model.max_loops
    return f"{model.mean_recurrence} given; allowed: 1 to max_loops = {limit}; nearest: {limit}"


@coded("MDS223")
def discretisation(model: ModelConfig) -> str | None:
    if model.discretisation != "direct" or model.injection != "pre":
        return None
    return '"direct" given; allowed with injection "pre": "euler" or "zoh"'


@coded("MDS202")
def halting(model: ModelConfig) -> str | None:
    """A gate learns from a model that does not change any more."""
    if model.halting != "gate":
        return None
    return (
        '"gate" given; allowed in training: "none", "act" or "act_openmythos" (train with "none", and the gate '
        'afterwards with: mythos-ds train-gate --model FOLDER --output FOLDER); nearest: "none"'
    )


@coded("MDS225")
def size(model: ModelConfig) -> str | None:
    """Whether the model is of a size that torch can address, by the part that has most of it."""
    dim, dense = model.dim, model.prelude_layers + model.coda_layers
    mla = model.attn_type == "mla"
    if mla and None in (model.kv_lora_rank, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim):
        return None
    widths = (
        "q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim" if mla else "n_kv_heads, head_dim"
    )
    shared = 3 * dim * model.n_shared_experts * model.resolved_shared_dim
    parts = {
        "vocab_size": model.vocab_size * dim,
        f"n_heads, {widths}": (dense + model.recurrent_layers) * attention_matmul(model),
        "ffn_dim": dense * 3 * dim * model.ffn_dim,
        "n_experts, expert_dim": routed_parameters(model),
        "n_shared_experts, shared_expert_dim": model.recurrent_layers * shared,
        "lora_rank": model.lora_rank * (2 * dim + model.max_loops),
    }
    total, largest = sum(parts.values()), max(parts, key=lambda name: parts[name])
    if total <= MAX_PARAMETERS:
        return None
    return (
        f"{dim} given, a model of {total:.1e} parameters, most of them by {largest}; allowed: at most "
        f"{MAX_PARAMETERS:.0e} parameters"
    )


def routed_parameters(model: ModelConfig) -> int:
    """Parameters of all routed experts."""
    return model.recurrent_layers * model.n_experts * 3 * model.dim * model.expert_dim
