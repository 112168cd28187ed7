"""What a server of several GPUs needs of a model: the cache of a token, into how many parts its matrices can be cut,
and the bytes that one GPU holds. As vLLM cuts them: heads and hidden units among tensor-parallel ranks, experts whole
among all ranks (expert parallelism) or by their hidden units too.
"""

from dataclasses import dataclass, replace
from typing import Literal

from mythos_ds.config.attention_shapes import mla_widths
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.flops import cache_bytes_per_token
from mythos_ds.costs.params import attention_head_widths, count_parameters

FP8_BLOCK = 128
"""Rows and columns of an fp8 matrix that share a scale (mythos_ds/conversion/fp8.py)."""
_VOCABULARY_PADDING = 64
"""vLLM fills the rows of embedding and head to a multiple of this before it divides them."""
_SCALE_BYTES = 4

Kept = Literal["fp8", "bfloat16", "float32"]


@dataclass(frozen=True)
class ServedTensor:
    """All tensors of one name and shape in an exported folder.

    Attributes:
        name: in the folder, without the numbers of layer and expert.
        copies: how many the folder has.
        rows, columns: of one; a vector has one column.
        kept: the type that an fp8 export gives it; "fp8" is bfloat16 in others.
        cut: which of the two tensor-parallel ranks divide.
        units: into how many parts at the most (heads, hidden units).
        unit: what one of them is.
        repeats: whether ranks beyond `units` have copies.
        joined: whether servers put another matrix below it, so that its rows must be whole blocks on one rank too.
        expert: whether it is a routed expert's.
    """

    name: str
    copies: int
    rows: int
    columns: int
    kept: Kept = "float32"
    cut: Literal["rows", "columns", "nothing"] = "nothing"
    units: int = 1
    unit: str = ""
    repeats: bool = False
    joined: bool = False
    expert: bool = False

    def share(self, ranks: int) -> tuple[int, int]:
        """Rows and columns that each of `ranks` ranks has of it; `ranks` must divide it (`misfit`)."""
        if self.cut == "nothing":
            return self.rows, self.columns
        extent = self.rows if self.cut == "rows" else self.columns
        # A vocabulary has more units than rows where it is filled up.
        own = max(1, self.units // ranks) * max(1, extent // self.units)
        return (own, self.columns) if self.cut == "rows" else (self.rows, own)


@dataclass(frozen=True)
class Division:
    """How a server's GPUs divide a model: `tensor` ranks times `data` replicas of attention. experts: each "whole" on
    one GPU (expert parallelism over all of them), or "divided" among all."""

    tensor: int = 1
    data: int = 1
    experts: Literal["whole", "divided"] = "whole"

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.tensor * self.data


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel sizes that a folder allows, in order, and why twice the largest is none of them."""

    sizes: tuple[int, ...]
    limit: str

    @property
    def largest(self) -> int:
        """The largest size; 0 where there is none."""
        return max(self.sizes, default=0)


@dataclass(frozen=True)
class TokenCache:
    """Bytes one token leaves in a server's cache, which has a slot per (loop, layer).

    Attributes:
        slots: attentions that a token goes through.
        kept: bytes of grouped keys and values, or of latents with their rope key.
        expanded: bytes where a server keeps keys and values of each head; values are filled to the keys' width.
    """

    slots: int
    kept: int
    expanded: int


def token_cache(model: ModelConfig, n_loops: int, bytes_per_value: int = 2) -> TokenCache:
    """The cache of one token at `n_loops` loops, on all tensor-parallel ranks together (latents are on each)."""
    slots = model.prelude_layers + model.coda_layers + n_loops * model.recurrent_layers
    kept = cache_bytes_per_token(model, n_loops, bytes_per_value)
    if model.attn_type == "gqa":
        return TokenCache(slots, kept, kept)
    keys, _ = attention_head_widths(model)
    return TokenCache(slots, kept, slots * 2 * model.n_heads * keys * bytes_per_value)


def rank_cache_bytes(model: ModelConfig, n_loops: int, tensor: int, bytes_per_value: int = 2) -> int:
    """Bytes one token leaves on each tensor-parallel rank: latents whole, of grouped attention its key/value heads."""
    kept = token_cache(model, n_loops, bytes_per_value).kept
    if model.attn_type == "mla":
        return kept
    heads = model.resolved_kv_heads
    return kept // heads * max(1, heads // tensor)


def tensor_parallel(model: ModelConfig, *, fp8: bool, experts: Literal["whole", "divided"]) -> TensorParallel:
    """Into how many tensor-parallel parts a folder of `model` can be cut."""
    sizes = tuple(
        size for size in range(1, model.n_heads + 1) if misfit(model, Division(size, 1, experts), fp8=fp8) is None
    )
    next_size = 2 * max(sizes, default=0) or 1
    why = misfit(model, Division(next_size, 1, experts), fp8=fp8)
    return TensorParallel(sizes, f"{next_size}: {why}")


def misfit(model: ModelConfig, division: Division, *, fp8: bool) -> str | None:
    """Why a server cannot divide a folder so, by the matrix that stops it; None where it can."""
    if division.experts == "whole" and division.gpus > model.n_experts:
        return f"{model.n_experts:,} experts are fewer than {division.gpus:,} GPUs"
    cuts = [(tensor, _ranks(tensor, division)) for tensor in served_tensors(model)]
    for tensor, ranks in cuts:
        copied = tensor.repeats and ranks % tensor.units == 0
        if tensor.cut != "nothing" and tensor.units % ranks and not copied:
            return f"{tensor.units:,} {tensor.unit} of {tensor.name} are not divisible by {ranks}"
    if not fp8:
        return None
    for tensor, ranks in cuts:
        if tensor.kept != "fp8" or tensor.cut == "nothing" or (ranks == 1 and not tensor.joined):
            continue
        rows, columns = tensor.share(ranks)
        width = rows if tensor.cut == "rows" else columns
        if width % FP8_BLOCK:
            return f"{width:,} {tensor.cut} of {tensor.name} on each rank are no whole fp8 blocks of {FP8_BLOCK}"
    return None


def rank_weight_bytes(model: ModelConfig, division: Division, *, fp8: bool) -> int:
    """Bytes of a folder's tensors, in the folder's types, on the fullest GPU. Of latent attention in fp8 also what vLLM
    makes of kv_b_proj for decoding, in bfloat16, once a layer."""
    total = 0
    for tensor in served_tensors(model):
        rows, columns = tensor.share(_ranks(tensor, division))
        copies = tensor.copies
        if tensor.expert and division.experts == "whole":
            layers = model.recurrent_layers
            copies = layers * -(-copies // layers // division.gpus)
        blocks = fp8 and tensor.kept == "fp8"
        each = rows * columns * (1 if blocks else 4 if tensor.kept == "float32" else 2)
        if blocks:
            each += -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) * _SCALE_BYTES
            each += 2 * rows * columns if tensor.name == "self_attn.kv_b_proj" else 0
        total += copies * each
    return total


def _ranks(tensor: ServedTensor, division: Division) -> int:
    """Ranks that divide a tensor."""
    if not tensor.expert:
        return division.tensor
    return 1 if division.experts == "whole" else division.gpus


def served_tensors(model: ModelConfig) -> tuple[ServedTensor, ...]:
    """Every tensor of the exported folder. The small ones that are whole on every rank are one entry, `tables`."""
    dense, looped = model.prelude_layers + model.coda_layers, model.recurrent_layers
    words = -(-model.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    table = ServedTensor("embed_tokens", 1, model.vocab_size, model.dim, "bfloat16", "rows", words, "words")
    made = [table] if model.tie_embeddings else [table, replace(table, name="lm_head")]
    for tensor in _attention(model):
        made.append(replace(tensor, copies=dense + looped))
    made += _swiglu("mlp", dense, model.dim, model.ffn_dim)
    if model.n_shared_experts:
        width = model.n_shared_experts * model.resolved_shared_dim
        made += _swiglu("mlp.shared_experts", looped, model.dim, width)
    experts = _swiglu("mlp.experts", looped * model.n_experts, model.dim, model.expert_dim)
    made += [replace(tensor, expert=True) for tensor in experts]
    if model.lora_rank:
        made.append(ServedTensor("recurrent.lora.down", 1, model.lora_rank, model.dim, "bfloat16"))
        made.append(ServedTensor("recurrent.lora.up", 1, model.dim, model.lora_rank, "bfloat16"))
    return (*made, ServedTensor("tables", 1, _whole_elements(model), 1))


def _swiglu(name: str, copies: int, dim: int, hidden: int) -> list[ServedTensor]:
    gate = ServedTensor(f"{name}.gate_proj", copies, hidden, dim, "fp8", "rows", hidden, "hidden units", joined=True)
    down = ServedTensor(f"{name}.down_proj", copies, dim, hidden, "fp8", "columns", hidden, "hidden units")
    return [gate, replace(gate, name=f"{name}.up_proj", joined=False), down]


def _attention(model: ModelConfig) -> list[ServedTensor]:
    """The matrices of one attention, and its biases and gains that ranks divide."""
    dim, heads = model.dim, model.n_heads
    keys, values = attention_head_widths(model)
    if model.attn_type == "gqa":
        return _grouped(model)
    latent, nope, rope, _ = mla_widths(model)
    low = model.q_lora_rank
    query = ServedTensor(
        "self_attn.q_proj" if low is None else "self_attn.q_b_proj",
        1, heads * keys, dim if low is None else low, "fp8", "rows", heads, "attention heads",
    )  # fmt: skip
    made = [query] if low is None else [ServedTensor("self_attn.q_a_proj", 1, low, dim, "fp8"), query]
    return [
        *made,
        ServedTensor("self_attn.kv_a_proj_with_mqa", 1, latent + rope, dim, "fp8"),
        replace(query, name="self_attn.kv_b_proj", rows=heads * (nope + values), columns=latent),
        ServedTensor("self_attn.o_proj", 1, dim, heads * values, "fp8", "columns", heads, "attention heads"),
    ]


def _grouped(model: ModelConfig) -> list[ServedTensor]:
    dim, heads, kv_heads, width = model.dim, model.n_heads, model.resolved_kv_heads, model.resolved_head_dim
    q = ServedTensor(
        "self_attn.q_proj", 1, heads * width, dim, "fp8", "rows", heads, "attention heads", joined=True
    )  # fmt: skip
    k = replace(
        q, name="self_attn.k_proj", rows=kv_heads * width, units=kv_heads, unit="key/value heads", repeats=True
    )  # fmt: skip
    made = [
        q,
        k,
        replace(k, name="self_attn.v_proj", joined=False),
        ServedTensor("self_attn.o_proj", 1, dim, heads * width, "fp8", "columns", heads, "attention heads"),
    ]
    vectors = made[:3] if model.attention_biases != "none" else []
    made += [replace(one, name=f"{one.name}.bias", columns=1, kept="float32", joined=False) for one in vectors]
    if model.qk_norm and model.qk_norm_span == "all":
        gains = (("self_attn.q_norm", q), ("self_attn.k_norm", k))
        made += [replace(one, name=name, columns=1, kept="float32", joined=False) for name, one in gains]
    return made


def _whole_elements(model: ModelConfig) -> int:
    """fp32 numbers that every rank has: norms, injection, loop tables, routers with their biases."""
    dim, attentions = model.dim, model.prelude_layers + model.coda_layers + model.recurrent_layers
    other = count_parameters(model).other - 2 * model.lora_rank * dim
    other -= dim + 1 if model.halting != "none" else 0  # no export has it
    norms = 2 * dim * (model.prelude_layers + model.coda_layers)
    if model.attn_type == "mla":
        norms += attentions * ((model.q_lora_rank or 0) + mla_widths(model)[0])
    else:
        gains = 2 * model.resolved_head_dim if model.qk_norm and model.qk_norm_span == "head" else 0
        norms += attentions * (gains + (dim if model.attention_biases == "all" else 0))
    router = model.n_experts * (dim + 1 + model.max_loops) + model.max_loops
    return other + norms + model.recurrent_layers * router


def serving_notes(model: ModelConfig, n_loops: int, kept: Kept) -> list[str]:
    """What a folder whose matrices are `kept` so asks of a server: cache bytes per token, and the largest
    tensor-parallel size with the reason why it is not larger."""
    width, values = (4, "float32") if kept == "float32" else (2, "bfloat16")
    cache = token_cache(model, n_loops, width)
    if model.attn_type == "mla":
        latent, _, rope, _ = mla_widths(model)
        slot = f"{latent} + {rope} values in {values}; {cache.expanded:,} where keys and values of each head are kept"
    else:
        slot = f"2 x {model.resolved_kv_heads} heads x {model.resolved_head_dim} values in {values}"
    text = f"cache of a server: {cache.kept:,} bytes per token at {n_loops} loops: {cache.slots:,} slots of {slot}"
    return [text, _tensor_parallel_note(model, fp8=kept == "fp8")]


def _tensor_parallel_note(model: ModelConfig, *, fp8: bool) -> str:
    divided, whole = (tensor_parallel(model, fp8=fp8, experts=experts) for experts in ("divided", "whole"))
    said = f"at most {divided.largest}" if divided.largest else "no size"
    said = f"tensor parallel{' in fp8' if fp8 else ''}: {said}; {divided.limit}"
    if whole.largest > divided.largest:
        said += f"; with whole experts (--enable-expert-parallel) at most {whole.largest}"
    if fp8:
        plain = tensor_parallel(model, fp8=False, experts="divided")
        said += f"; dequantised at most {plain.largest}"
    return said
