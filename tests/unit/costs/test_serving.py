"""What a server needs of a model, against the exported tensors themselves and numbers worked out by hand."""

import math
from collections import Counter

import pytest
import torch

import mythos_ds
from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.fp8 import BLOCK, is_quantised
from mythos_ds.conversion.hf_names import Names
from mythos_ds.conversion.model_target import folder_dtype
from mythos_ds.costs.serving import (
    FP8_BLOCK,
    Division,
    misfit,
    rank_cache_bytes,
    rank_weight_bytes,
    served_tensors,
    serving_notes,
    tensor_parallel,
    token_cache,
)
from mythos_ds.weights.reader import TensorSpec
from mythos_ds.weights.whole_model import expected_specs

PRESETS = ("tiny", "1b", "3b", "10b", "50b", "100b", "500b", "1t")
SMALL = {"vocab_size": 192, "dim": 128, "ffn_dim": 256, "n_experts": 8, "expert_dim": 128, "n_heads": 4, "max_loops": 6,
         "mean_recurrence": 3, "prelude_layers": 1, "recurrent_layers": 1, "coda_layers": 1,
         "n_experts_per_tok": 2}  # fmt: skip
GROUPED = {**SMALL, "attn_type": "gqa", "n_kv_heads": 2, "head_dim": 64, "qk_norm": True}
LATENT = {**SMALL, "attn_type": "mla", "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
          "v_head_dim": 24, "tie_embeddings": True, "recurrent_layers": 2}  # fmt: skip
MODELS = {
    "biases": {**GROUPED, "attention_biases": "all", "qk_norm_span": "all", "n_shared_experts": 2},
    "query-biases": {**GROUPED, "attention_biases": "qkv", "lora_rank": 4, "shared_expert_dim": 192},
    "latent": {**LATENT, "prelude_layers": 2, "loop_embedding": "none"},
    "latent-query": {**LATENT, "q_lora_rank": 48, "n_shared_experts": 0, "injection": "post", "halting": "gate"},
    "untied": {**LATENT, "prelude_layers": 3, "tie_embeddings": False, "lora_rank": 2, "prelude_norm": False},
}


def model_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate(MODELS[name]) if name in MODELS else load_config(f"{name}.json").config.model


def exported(model: ModelConfig) -> dict[str, tuple[TensorSpec, bool]]:
    """(spec, whether fp8 takes it) of every tensor of a bf16 export, from the module on the meta device and the
    converter's rules."""
    names, found = Names(model.attn_type == "mla", model.norm_placement), {}
    for ours, spec in expected_specs(model).items():
        if ours.startswith("recurrent.gate."):
            continue
        kind, theirs = folder_dtype(ours, spec, torch.bfloat16), names.to_hf(ours)
        stacked = "*" in theirs
        for expert in range(spec.shape[0] if stacked else 1):
            own = TensorSpec(kind, spec.shape[1:] if stacked else spec.shape)
            name = theirs.replace("*", str(expert))
            found[name] = own, is_quantised(name, own)
    return found


@pytest.mark.parametrize("name", [*PRESETS, *MODELS])
def test_the_matrices_are_those_of_the_export(name: str) -> None:
    model = model_of(name)
    folder: Counter[tuple[int | str, ...]] = Counter()
    told: Counter[tuple[int | str, ...]] = Counter()
    small = 0
    for spec, quantised in exported(model).values():
        if quantised or spec.dtype == torch.bfloat16:
            folder[(*spec.shape, "fp8" if quantised else "bfloat16")] += 1
        else:
            small += math.prod(spec.shape)
    for tensor in served_tensors(model):
        if tensor.kept == "float32":
            small -= tensor.copies * tensor.rows * tensor.columns
        else:
            told[(tensor.rows, tensor.columns, tensor.kept)] += tensor.copies
    assert told == folder
    assert small == 0


@pytest.mark.parametrize("name", [*PRESETS, *MODELS])
@pytest.mark.parametrize("fp8", [False, True])
def test_one_rank_holds_the_folder(name: str, fp8: bool) -> None:
    model, bytes_of = model_of(name), 0
    for theirs, (spec, quantised) in exported(model).items():
        numbers = math.prod(spec.shape)
        if fp8 and quantised:
            scales = math.prod(-(-size // BLOCK) for size in spec.shape)
            absorbed = 2 * numbers if theirs.endswith("kv_b_proj.weight") else 0
            bytes_of += numbers + 4 * scales + absorbed
        else:
            bytes_of += numbers * spec.dtype.itemsize
    assert rank_weight_bytes(model, Division(), fp8=fp8) == bytes_of


def test_a_rank_of_100b_by_hand() -> None:
    """8 GPUs: tensor parallel 8, and each with 64 of 512 experts; 6 looped and 6 dense layers, 48 heads."""
    model = model_of("100b")
    table = 131_072 // 8 * 5_120 * 2 * 2  # embedding and head, bfloat16
    cut = 6 * 192 * 1_536 + 6 * 256 * 512 + 5_120 * 6 * 128  # q_b, kv_b and o of six heads
    whole = 1_536 * 5_120 + 576 * 5_120
    dense, shared, experts = 3 * 1_792 * 5_120, 3 * 256 * 5_120, 64 * 3 * 2_048 * 5_120
    numbers = 12 * (cut + whole) + 6 * (dense + shared + experts)
    lora = 2 * 64 * 5_120
    bf16 = rank_weight_bytes(model, Division(8), fp8=False)
    tables = bf16 - table - 2 * numbers - 2 * lora
    assert 6 * 512 * 5_120 * 4 < tables < 6 * 512 * 5_120 * 4 + 3e6  # routers in fp32, and little beside them
    in_fp8 = rank_weight_bytes(model, Division(8), fp8=True)
    rows = 12 * (9 * 12 + 12 * 4 + 40 * 6 + 12 * 40 + 5 * 40)  # blocks of q_b, kv_b, o, q_a, kv_a (576 rows: 4.5)
    blocks = rows + 6 * (3 * 14 * 40 + 3 * 2 * 40 + 64 * 3 * 16 * 40)
    absorbed = 12 * 2 * 6 * 256 * 512
    assert bf16 - in_fp8 == numbers - 4 * blocks - absorbed


@pytest.mark.parametrize(
    ("division", "parts"),
    [(Division(2), 2), (Division(2, 2, "divided"), 4), (Division(1, 8), 8), (Division(4, 2, "whole"), 8)],
)
def test_experts_are_spread_over_all_ranks(division: Division, parts: int) -> None:
    model = model_of("100b")
    routed = model.recurrent_layers * model.n_experts * 3 * model.dim * model.expert_dim
    fewer = model.model_copy(update={"n_experts": model.n_experts // 2})
    router = 4 * model.recurrent_layers * 256 * (model.dim + 1 + model.max_loops)
    saved = rank_weight_bytes(model, division, fp8=False) - rank_weight_bytes(fewer, division, fp8=False)
    assert saved == 2 * routed // 2 // parts + router


def test_cache_bytes_by_hand() -> None:
    """12 + 16 x 6 - 6 slots of 512 + 64 bfloat16 values; expanded 48 heads of 192, keys and values."""
    made = token_cache(model_of("100b"), 16)
    assert (made.slots, made.kept, made.expanded) == (102, 102 * 576 * 2, 102 * 2 * 48 * 192 * 2)
    assert rank_cache_bytes(model_of("100b"), 16, 8) == made.kept, "latents are on every rank"
    grouped = model_of("tiny")  # 2 key/value heads of 32; one layer before, one after, one looped
    assert token_cache(grouped, 7, 4).kept == 9 * 2 * 2 * 32 * 4 == token_cache(grouped, 7, 4).expanded
    assert [rank_cache_bytes(grouped, 7, ranks, 4) for ranks in (1, 2, 4)] == [4608, 2304, 2304]


@pytest.mark.parametrize(
    ("name", "changes", "sizes", "limit"),
    [
        ("100b", {}, (1, 2, 4, 8), "16: 576 rows of self_attn.q_b_proj on each rank are no whole fp8 blocks of 128"),
        ("500b", {}, (1, 2, 4, 8), "16: 576 rows of self_attn.q_b_proj on each rank are no whole fp8 blocks of 128"),
        ("1t", {}, (1, 2, 4, 8, 16, 32), "64: 192 rows of self_attn.q_b_proj on each rank"),
        ("100b", {"n_heads": 40, "ffn_dim": 13_824}, (1, 2, 4), "8: 960 rows of self_attn.q_b_proj on each rank"),
        ("100b", {"ffn_dim": 13_824}, (1, 2, 4), "8: 1,728 rows of mlp.gate_proj on each rank"),
        ("1t", {"n_heads": 72, "expert_dim": 4_352}, (1, 2), "4: 1,088 rows of mlp.shared_experts.gate_proj"),
        ("1t", {"expert_dim": 4_352, "shared_expert_dim": 4_096}, (1, 2), "4: 1,088 rows of mlp.experts.gate_proj"),
        ("50b", {}, (1,), "2: 832 rows of mlp.shared_experts.gate_proj on each rank"),
        ("10b", {}, (), "1: 992 rows of mlp.shared_experts.gate_proj on each rank"),
    ],
)
def test_the_matrix_that_stops_fp8_is_named(name, changes, sizes, limit) -> None:
    made = tensor_parallel(model_of(name).model_copy(update=changes), fp8=True, experts="divided")
    assert made.sizes == sizes
    assert made.limit.startswith(limit)


@pytest.mark.parametrize("name", ["100b", "500b", "1t"])
def test_large_presets_fit_eight_ranks_in_fp8(name: str) -> None:
    assert FP8_BLOCK == BLOCK
    for experts in ("whole", "divided"):
        made = tensor_parallel(model_of(name), fp8=True, experts=experts)
        assert {1, 2, 4, 8} <= set(made.sizes)
        assert made.largest >= 8


def test_heads_words_and_units_must_divide() -> None:
    model = model_of("100b")
    assert misfit(model, Division(32), fp8=False) == "48 attention heads of self_attn.q_b_proj are not divisible by 32"
    assert misfit(model, Division(3), fp8=False) == "131,072 words of embed_tokens are not divisible by 3"
    assert misfit(model, Division(2, 512), fp8=False) == "512 experts are fewer than 1,024 GPUs"
    assert misfit(model, Division(2, 256), fp8=False) is None
    three = model.model_copy(update={"vocab_size": 3 * 64 * 2 - 7, "ffn_dim": 14_592})  # filled up to 384 words
    said = "2,048 hidden units of mlp.shared_experts.gate_proj are not divisible by 3"
    assert misfit(three, Division(3), fp8=False) == said
    whole = three.model_copy(update={"shared_expert_dim": 1_536})
    assert misfit(whole, Division(3), fp8=False) is None, "experts are whole"
    assert "mlp.experts.gate_proj" in (misfit(whole, Division(3, 1, "divided"), fp8=False) or "")
    assert rank_weight_bytes(whole, Division(3), fp8=False) < rank_weight_bytes(whole, Division(1), fp8=False)


def test_key_value_heads_are_copied_where_they_are_fewer() -> None:
    own = {"n_heads": 12, "head_dim": 128, "vocab_size": 384, "tie_embeddings": False, "n_shared_experts": 1}
    model = ModelConfig.model_validate({**GROUPED, **own})
    assert tensor_parallel(model, fp8=False, experts="whole").sizes == (1, 2, 4)
    assert misfit(model, Division(3), fp8=False) == "2 key/value heads of self_attn.k_proj are not divisible by 3"
    two, four = (rank_weight_bytes(model, Division(ranks), fp8=False) for ranks in (2, 4))
    attentions, dim = 3, 128
    q_and_o, words = 2 * (12 // 4) * 128 * dim * attentions, 2 * 96 * dim
    ffn, shared, experts = (3 * dim * width for width in (2 * 64, 32, 2 * 128))
    assert two - four == 2 * (q_and_o + words + ffn + shared + experts)


@pytest.mark.parametrize(
    ("dtype", "cache", "parallel"),
    [
        (
            "float32",
            "3,072 bytes per token at 4 loops: 6 slots of 2 x 2 heads x 32 values in float32",
            "at most 4; 8: 4",
        ),
        (
            "bfloat16",
            "1,536 bytes per token at 4 loops: 6 slots of 2 x 2 heads x 32",
            "at most 4; 8: 4 attention heads",
        ),
        ("fp8", "1,536 bytes per token", "in fp8: no size; 1: 64 rows of self_attn.k_proj"),
    ],
)
def test_the_converter_says_what_a_folder_asks_of_a_server(tmp_path, dtype, cache, parallel) -> None:
    cache_note, parallel_note = mythos_ds.convert("tiny", tmp_path / "hf", dtype=dtype)[-2:]
    assert f"cache of a server: {cache}" in cache_note
    assert parallel in parallel_note
    assert parallel_note.endswith("; dequantised at most 4") == (dtype == "fp8")


def test_notes_of_latent_attention_name_both_caches_and_whole_experts() -> None:
    model = model_of("1t").model_copy(update={"expert_dim": 4_352, "shared_expert_dim": 4_096})
    cache, parallel = serving_notes(model, 64, "fp8")
    slots = 8 + 64 * 8
    assert f"{slots * 576 * 2:,} bytes per token at 64 loops: {slots} slots of 512 + 64 values" in cache
    assert f"; {slots * 2 * 64 * 192 * 2:,} where keys and values of each head are kept" in cache
    assert "at most 2; 4: 1,088 rows of mlp.experts.gate_proj" in parallel
    assert "with whole experts (--enable-expert-parallel) at most 32" in parallel
