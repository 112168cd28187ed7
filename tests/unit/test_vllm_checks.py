"""What the vLLM plugin refuses, by its message; no engine and no vLLM is needed to say it."""

from typing import Any

import pytest

pytest.importorskip("transformers")
from mythos_ds.config.loader import load_config
from mythos_ds.conversion.huggingface import FIELDS
from mythos_hf.configuration_mythos import MythosConfig
from mythos_vllm.checks import (
    DEQUANTISE,
    Layout,
    check_latent_backend,
    check_layout,
    check_quantisation,
    dequantises,
    expansion,
    fitting_sizes,
    latent_cache_fits,
)

GROUPED: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "n_routed_experts": 16, "moe_intermediate_size": 512,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 40, "attention_type": "mla",
    "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 16, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 2048,
}  # fmt: skip


def grouped(**changes: Any) -> MythosConfig:
    return MythosConfig(**{**GROUPED, **changes})


def latent(**changes: Any) -> MythosConfig:
    return MythosConfig(**{**LATENT, **changes})


def preset(name: str) -> MythosConfig:
    """The configuration that an export of a preset has, as far as its widths go."""
    model = load_config(f"{name}.json").config.model
    kept = model.model_dump(mode="json")
    values = {theirs: kept[ours] for ours, theirs in FIELDS.items()}
    own = {"head_dim": model.resolved_head_dim, "num_key_value_heads": model.resolved_kv_heads}
    values |= {} if model.attn_type == "mla" else own
    return MythosConfig(**values, shared_expert_intermediate_size=model.resolved_shared_dim)


def refused(config: MythosConfig, fp8: bool = False, **sizes: Any) -> str:
    with pytest.raises(ValueError) as error:
        check_layout(config, Layout(**sizes), fp8)
    return str(error.value)


def test_what_divides_is_allowed() -> None:
    for ranks in (1, 2, 4, 8):
        check_layout(grouped(), Layout(tensor_parallel_size=ranks), fp8=False)
    check_layout(grouped(), Layout(tensor_parallel_size=4, data_parallel_size=2, enable_expert_parallel=True), fp8=True)


def test_heads_that_ranks_cannot_divide() -> None:
    assert refused(grouped(), tensor_parallel_size=3) == (
        "tensor_parallel_size: given 3; allowed: 1, 2, 4, 8, because num_attention_heads 8 is not divisible by 3; "
        "nearest: 2"
    )


def test_key_and_value_heads_are_divided_or_copied_whole() -> None:
    config = grouped(num_attention_heads=12, num_key_value_heads=3, intermediate_size=3072, moe_intermediate_size=768)
    assert fitting_sizes(config, Layout(), fp8=False) == [1, 3, 6, 12]
    assert "num_key_value_heads 3 neither divides 2 nor is divided by it" in refused(config, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 2047}, "intermediate_size 2047 is not divisible by 2"),
        (
            {"shared_expert_intermediate_size": 7, "n_shared_experts": 3},
            "the shared experts' width 21 is not divisible",
        ),
        ({"moe_intermediate_size": 513, "shared_expert_intermediate_size": 8}, "moe_intermediate_size 513 is not"),
    ],
)
def test_widths_that_ranks_cannot_divide(changes: dict[str, Any], reason: str) -> None:
    assert reason in refused(grouped(**changes), tensor_parallel_size=2)


def test_data_parallel_ranks_divide_experts_too_unless_they_are_whole() -> None:
    config = grouped(moe_intermediate_size=12, shared_expert_intermediate_size=16)
    message = refused(config, tensor_parallel_size=4, data_parallel_size=2)
    assert "moe_intermediate_size 12 is not divisible by 8" in message
    assert message.endswith("; nearest: 2; with --enable-expert-parallel up to 8")
    check_layout(config, Layout(4, data_parallel_size=2, enable_expert_parallel=True), fp8=False)


@pytest.mark.parametrize(
    "name", ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"]
)
def test_ways_of_dividing_that_a_loop_does_not_have(name: str) -> None:
    sizes: dict[str, Any] = {name: 2}
    assert refused(grouped(), **sizes).startswith(f"{name}: given 2; allowed: 1")


def test_experts_do_not_move() -> None:
    assert refused(grouped(), enable_eplb=True).startswith("enable_eplb: given true; allowed: false")


def test_choices_must_fit_in_the_columns_of_logits() -> None:
    message = refused(grouped(n_routed_experts=8, num_experts_per_tok=5))
    assert message == "num_experts_per_tok: given 5; allowed: at most half of 8 experts"


@pytest.mark.parametrize(
    ("config", "ranks", "matrix"),
    [
        (latent(), 8, "960 of self_attn.q_b_proj"),
        (latent(q_lora_rank=None), 8, "960 of self_attn.q_proj"),
        (latent(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=32), 8, "480 of self_attn.kv_b_proj"),
        (latent(qk_nope_head_dim=112, qk_rope_head_dim=16, v_head_dim=16), 4, "160 of self_attn.o_proj"),
        (latent(intermediate_size=13824), 8, "960 of self_attn.q_b_proj"),
        (latent(num_attention_heads=48, intermediate_size=13824), 8, "1728 of mlp.gate_proj"),
        (
            latent(num_attention_heads=48, shared_expert_intermediate_size=1088),
            4,
            "272 of mlp.shared_experts.gate_proj",
        ),
        (latent(num_attention_heads=64, moe_intermediate_size=4352), 4, "1088 of mlp.experts.gate_proj"),
        (grouped(head_dim=64), 8, "64 of self_attn.q_proj"),
        (grouped(num_attention_heads=16, head_dim=64), 4, "64 of self_attn.k_proj"),
    ],
)
def test_shares_of_fp8_matrices_are_whole_blocks(config: MythosConfig, ranks: int, matrix: str) -> None:
    check_layout(config, Layout(tensor_parallel_size=ranks), fp8=False)
    message = refused(config, fp8=True, tensor_parallel_size=ranks)
    assert f"because a rank's {matrix} are not whole fp8 blocks of 128" in message
    assert message.endswith(f"; without blocks: {DEQUANTISE}")


def test_the_largest_size_that_fp8_allows_is_named() -> None:
    message = refused(latent(), fp8=True, tensor_parallel_size=8)
    assert "given 8; allowed: 1, 2, 4, because" in message
    assert "; nearest: 4;" in message
    message = refused(latent(num_attention_heads=64, moe_intermediate_size=4352), fp8=True, tensor_parallel_size=4)
    assert "given 4; allowed: 1, 2, because" in message
    assert "with --enable-expert-parallel up to 16" in message


def test_experts_below_one_block_are_refused_on_one_rank_too() -> None:
    assert "given 1; allowed: none, because a rank's 96 of mlp.experts" in refused(
        latent(moe_intermediate_size=96), fp8=True
    )
    check_layout(latent(kv_lora_rank=96, q_lora_rank=100), Layout(), fp8=True)  # nothing is put below these


@pytest.mark.parametrize(("name", "least"), [("100b", 8), ("500b", 8), ("1t", 16)])
def test_presets_in_fp8_are_divided_by_a_node(name: str, least: int) -> None:
    assert max(fitting_sizes(preset(name), Layout(), fp8=True)) >= least


def test_quantisations_that_the_model_does_not_have() -> None:
    check_quantisation("fp8", [128, 128], native=True)
    with pytest.raises(ValueError, match="quantization: given 'awq'; allowed: none, or a folder exported with"):
        check_quantisation("awq", None, native=True)
    with pytest.raises(ValueError, match=r"weight_block_size: given None; allowed: \[128, 128\]"):
        check_quantisation("fp8", None, native=True)
    with pytest.raises(ValueError) as error:
        check_quantisation("fp8", [128, 128], native=False)
    assert str(error.value) == (
        f"quantization: given fp8 on a CPU without AMX, which has no kernels for it; allowed: {DEQUANTISE}"
    )


def test_dequantising_is_asked_for() -> None:
    assert not dequantises(grouped())
    assert not dequantises(grouped(quantization_config={"quant_method": "fp8"}))
    assert dequantises(grouped(quantization_config={"quant_method": "fp8", "dequantize": True}))
    with pytest.raises(ValueError, match="dequantize: given with quant_method 'awq'; allowed: with 'fp8'"):
        dequantises(grouped(quantization_config={"quant_method": "awq", "dequantize": True}))


def test_where_latents_are_cached() -> None:
    other = latent(kv_lora_rank=256, qk_rope_head_dim=32)
    assert latent_cache_fits(latent(), on_cpu=True)
    assert not latent_cache_fits(other, on_cpu=True)
    assert latent_cache_fits(other, on_cpu=False)
    assert not latent_cache_fits(grouped(), on_cpu=False)


def test_amx_is_refused_for_latents() -> None:
    check_latent_backend(None, amx=False)
    check_latent_backend("CPU_MLA", amx=True)
    for backend, given in ((None, "AMX_MLA by default on this CPU"), ("AMX_MLA", "AMX_MLA")):
        with pytest.raises(ValueError, match=f"attention backend: given {given}; allowed: CPU_MLA; start with"):
            check_latent_backend(backend, amx=True)


def test_what_keys_and_values_cost_over_latents() -> None:
    # 40 heads with keys and values of 192 (values are padded) over 512 + 64.
    assert expansion(latent(), 1) == pytest.approx(2 * 40 * 192 / 576)
    assert expansion(latent(), 8) == pytest.approx(2 * 5 * 192 / 576)
