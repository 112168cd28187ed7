"""What the model cannot do on vLLM, refused at start with what can be had instead. Nothing here needs vLLM.

Every size is the configuration's, so that a refusal costs no weights: widths of attention, feed-forwards and experts
must divide among ranks, and shares of fp8 matrices must end where blocks of scales end.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mythos_hf.configuration_mythos import MythosConfig, filled

BLOCK = 128
"""Rows and columns that one scale of an fp8 folder is for."""
DEQUANTISE = """--hf-overrides '{"quantization_config": {"quant_method": "fp8", "dequantize": true}}'"""
"""The request to load an fp8 folder in the server's own type."""
CPU_LATENT = (512, 64)
"""kv_lora_rank and qk_rope_head_dim that vLLM's kernel for CPUs is compiled for."""


class Layout(NamedTuple):
    """How a server's ranks divide the model, in vLLM's words. balanced: whether experts move between ranks (EPLB)."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False

    def expert_ranks(self) -> int:
        """Ranks that share each expert's matrices: data-parallel ones too, unless experts are whole."""
        return 1 if self.enable_expert_parallel else self.tensor_parallel_size * self.data_parallel_size


class Share(NamedTuple):
    """What one rank has of a matrix that is divided. whole: whether it must be whole blocks even where it is all."""

    matrix: str
    width: int
    whole: bool


def check_layout(config: MythosConfig, layout: Layout, fp8: bool) -> None:
    """Raise ValueError for ranks that cannot divide the model. fp8: whether its matrices stay in blocks of fp8."""
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (given := getattr(layout, name)) > 1:
            raise ValueError(f"{name}: given {given}; allowed: 1; divide the looped model by tensor_parallel_size")
    if layout.enable_eplb:
        raise ValueError("enable_eplb: given true; allowed: false; the looped model's experts stay where they are")
    if 2 * config.num_experts_per_tok > config.n_routed_experts:
        given, experts = config.num_experts_per_tok, config.n_routed_experts
        raise ValueError(f"num_experts_per_tok: given {given}; allowed: at most half of {experts} experts")
    reason = misfit(config, layout, fp8)
    if reason is None:
        return
    size = layout.tensor_parallel_size
    sizes = fitting_sizes(config, layout, fp8)
    allowed = ", ".join(map(str, sizes)) or "none"
    advice = f"; nearest: {min(sizes, key=lambda other: abs(other - size))}" if sizes else ""
    whole = fitting_sizes(config, layout._replace(enable_expert_parallel=True), fp8)
    if max(whole, default=0) > max(sizes, default=0):
        advice += f"; with --enable-expert-parallel up to {max(whole)}"
    if fp8:
        advice += f"; without blocks: {DEQUANTISE}"
    raise ValueError(f"tensor_parallel_size: given {size}; allowed: {allowed}, because {reason}{advice}")


def fitting_sizes(config: MythosConfig, layout: Layout, fp8: bool) -> list[int]:
    """The tensor-parallel sizes that divide the model, `layout`'s other sizes given."""
    sizes = range(1, config.num_attention_heads + 1)
    return [size for size in sizes if misfit(config, layout._replace(tensor_parallel_size=size), fp8) is None]


def misfit(config: MythosConfig, layout: Layout, fp8: bool) -> str | None:
    """Why ranks cannot divide the model; None where they can."""
    ranks, kv_heads = layout.tensor_parallel_size, filled(config.num_key_value_heads)
    divided = [("num_attention_heads", config.num_attention_heads, ranks)]
    if config.num_prelude_layers + config.num_coda_layers:
        divided.append(("intermediate_size", config.intermediate_size, ranks))
    if config.n_shared_experts:
        divided.append(("the shared experts' width", shared_width(config), ranks))
    divided.append(("moe_intermediate_size", config.moe_intermediate_size, layout.expert_ranks()))
    for name, width, parts in divided:
        if width % parts:
            return f"{name} {width} is not divisible by {parts}"
    if kv_heads % ranks and ranks % kv_heads:
        return f"num_key_value_heads {kv_heads} neither divides {ranks} nor is divided by it"
    for share in fp8_shares(config, layout) if fp8 else ():
        if share.width % BLOCK:
            return f"a rank's {share.width} of {share.matrix} are not whole fp8 blocks of {BLOCK}"
    return None


def fp8_shares(config: MythosConfig, layout: Layout) -> Iterator[Share]:
    """Each rank's rows or columns of the matrices that must be whole blocks: those that ranks divide, and those below
    which vLLM puts another matrix."""
    ranks = layout.tensor_parallel_size
    shares = list(_attention_shares(config, ranks))
    if config.num_prelude_layers + config.num_coda_layers:
        shares.append(Share("mlp.gate_proj", config.intermediate_size // ranks, True))
    if config.n_shared_experts:
        shares.append(Share("mlp.shared_experts.gate_proj", shared_width(config) // ranks, True))
    shares.append(Share("mlp.experts.gate_proj", config.moe_intermediate_size // layout.expert_ranks(), True))
    return (share for share in shares if share.whole or ranks > 1)


def _attention_shares(config: MythosConfig, ranks: int) -> Iterator[Share]:
    heads, width = config.num_attention_heads // ranks, filled(config.head_dim)
    if config.attention_type == "mla":
        value = filled(config.v_head_dim)
        query = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        yield Share(f"self_attn.{query}", heads * width, False)
        yield Share("self_attn.kv_b_proj", heads * (filled(config.qk_nope_head_dim) + value), False)
        yield Share("self_attn.o_proj", heads * value, False)
        return
    kv_heads = max(1, filled(config.num_key_value_heads) // ranks)
    yield Share("self_attn.q_proj", heads * width, True)
    yield Share("self_attn.k_proj", kv_heads * width, True)
    yield Share("self_attn.v_proj", kv_heads * width, False)
    yield Share("self_attn.o_proj", heads * width, False)


def shared_width(config: MythosConfig) -> int:
    """Hidden units of the shared experts together."""
    return config.n_shared_experts * filled(config.shared_expert_intermediate_size)


def dequantises(config: Any) -> bool:
    """Whether a configuration asks for its fp8 matrices in the server's own type. Raises ValueError for another
    method: there is nothing to dequantise it with."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if not quantisation.get("dequantize"):
        return False
    if (method := quantisation.get("quant_method")) != "fp8":
        raise ValueError(f"quantization_config.dequantize: given with quant_method {method!r}; allowed: with 'fp8'")
    return True


def check_quantisation(method: str, block: list[int] | None, native: bool) -> None:
    """Raise ValueError for a quantisation that the model does not have here. native: whether the platform has kernels
    for blocks of fp8."""
    if method != "fp8":
        raise ValueError(f"quantization: given {method!r}; allowed: none, or a folder exported with --dtype fp8")
    if block != [BLOCK, BLOCK]:
        raise ValueError(f"weight_block_size: given {block}; allowed: [{BLOCK}, {BLOCK}]")
    if not native:
        raise ValueError(
            f"quantization: given fp8 on a CPU without AMX, which has no kernels for it; allowed: {DEQUANTISE}"
        )


def latent_cache_fits(config: Any, on_cpu: bool) -> bool:
    """Whether attention is latent and vLLM has a cache of latents of its widths."""
    if config.attention_type != "mla":
        return False
    return not on_cpu or (config.kv_lora_rank, config.qk_rope_head_dim) == CPU_LATENT


def check_latent_backend(backend: str | None, amx: bool) -> None:
    """Raise ValueError where a CPU would take the latent attention for AMX, which frees the matrix that the loops
    share once the first of them has packed it. backend: what the server was started with."""
    if backend == "AMX_MLA" or (amx and backend != "CPU_MLA"):
        given = backend or "AMX_MLA by default on this CPU"
        raise ValueError(f"attention backend: given {given}; allowed: CPU_MLA; start with --attention-backend CPU_MLA")


def expansion(config: MythosConfig, ranks: int) -> float:
    """How many times the memory of latents a rank's cache takes where it keeps keys and values of its heads."""
    latents = filled(config.kv_lora_rank) + filled(config.qk_rope_head_dim)
    return 2 * config.num_attention_heads // ranks * filled(config.head_dim) / latents
