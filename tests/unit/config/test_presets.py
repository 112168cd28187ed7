"""Every preset keeps the limits that were set for it, and the formulas agree with the module."""

import pytest

from mythos_ds.config.depth_distribution import deep_shares
from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.schema import RopeScaling
from mythos_ds.costs.flops import cache_bytes_per_token, expected_flops_per_token, flops_per_token, training_depth_pmf
from mythos_ds.costs.params import count_parameters
from tests.helpers.mains import load_main

# name: total, largest active share, vocabulary, max_loops, mean_recurrence
LIMITS = {
    "1b": (1e9, 0.20, 32768, 16, 8),
    "3b": (3e9, 0.15, 32768, 16, 8),
    "10b": (10e9, 0.10, 65536, 24, 12),
    "50b": (50e9, 0.07, 131072, 32, 16),
    "100b": (100e9, 0.06, 131072, 32, 16),
    "500b": (500e9, 0.04, 131072, 48, 16),
    "1t": (1e12, 0.04, 131072, 64, 16),
}
GQA = {
    "attn_type": "gqa", "q_lora_rank": None, "kv_lora_rank": None, "qk_nope_head_dim": None, "qk_rope_head_dim": None,
    "v_head_dim": None,
}  # fmt: skip
VARIANTS = [
    {"q_lora_rank": None},
    {"injection": "post", "discretisation": "direct"},
    {"halting": "act", "tie_embeddings": True},
    {"loop_embedding": "none", "lora_rank": 0, "n_shared_experts": 2, "shared_expert_dim": 96},
    {**GQA, "attention_biases": "qkv", "rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    {**GQA, "attention_biases": "all", "qk_norm": True},
    {**GQA, "qk_norm": True, "qk_norm_span": "all", "norm_placement": "after", "n_kv_heads": 2},
    {"n_shared_experts": 0, "lora_target": "output", "coda_layers": 0, "prelude_norm": False},
]


def module_parameters(model) -> int:
    torch = pytest.importorskip("torch")
    mythos = pytest.importorskip("mythos_ds.model.mythos")
    with torch.device("meta"):
        built = mythos.MythosModel(model)
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    total, active_share, vocabulary, max_loops, mean_recurrence = LIMITS[name]
    config = load_config(name).config
    model, counts = config.model, count_parameters(config.model)
    assert counts.total == pytest.approx(total, rel=0.015)
    assert counts.active_share <= active_share
    assert model.expert_dim <= model.dim / 2
    assert model.n_shared_experts in (1, 2)
    assert model.resolved_shared_dim == model.expert_dim
    assert (model.kv_lora_rank, model.qk_rope_head_dim) == (512, 64)
    assert (model.vocab_size, model.max_loops, model.mean_recurrence) == (
        vocabulary,
        max_loops,
        mean_recurrence,
    )
    assert total < 10e9 or model.n_experts % 64 == 0
    assert total < 100e9 or model.n_experts & (model.n_experts - 1) == 0
    assert deep_shares(training_depth_pmf(config))[max_loops - 1] >= 0.01


@pytest.mark.parametrize(("name", "most"), [("100b", 8), ("500b", 8), ("1t", 16)])
def test_shares_of_a_tensor_parallel_server_are_whole_fp8_blocks(name, most):
    """Of what is cut over processes: experts, feed-forwards, and the heads' queries, keys with values, and outputs."""
    model = load_config(name).config.model
    heads, rope = model.n_heads, model.qk_rope_head_dim
    assert model.qk_nope_head_dim
    assert rope
    assert model.v_head_dim
    widths = (
        model.expert_dim, model.n_shared_experts * model.resolved_shared_dim, model.ffn_dim,
        heads * (model.qk_nope_head_dim + rope), heads * (model.qk_nope_head_dim + model.v_head_dim),
        heads * model.v_head_dim,
    )  # fmt: skip
    shares = 1
    while shares <= most:
        assert heads % shares == 0
        assert [width % (128 * shares) for width in widths] == [0] * len(widths)
        shares *= 2


def test_tiny_trains_the_whole_architecture():
    config = load_config("tiny").config
    model = config.model
    assert model.lora_rank > 0
    assert model.loop_embedding == "scaled"
    assert model.expert_dim <= model.dim / 2
    assert model.n_shared_experts > 0
    assert (config.parallel.ep_size, config.parallel.zero_stage, config.data.corpus) == ("auto", 3, "builtin")
    assert deep_shares(training_depth_pmf(config))[-1] >= 0.01


@pytest.mark.parametrize("name", ["tiny", *LIMITS])
def test_formula_equals_module(name):
    config = load_config(name).config
    assert module_parameters(config.model) == count_parameters(config.model).total
    proxy, _ = make_proxy(config, 2)
    assert module_parameters(proxy.model) == count_parameters(proxy.model).total


@pytest.mark.parametrize("update", VARIANTS)
def test_formula_equals_module_for_variants(update):
    model = load_config("1b").config.model.model_copy(update=update)
    assert module_parameters(model) == count_parameters(model).total


def test_flops_follow_from_the_parameters():
    """Two FLOPs per active weight at one loop, three times that with gradient."""
    model = load_config("1b").config.model
    counts = count_parameters(model)
    cost = flops_per_token(model, context=1, n_loops=1)
    assert cost.forward == pytest.approx(2 * counts.active, rel=2e-3)  # norms and gains are not matrices
    assert cost.training == 3 * (cost.forward + cost.attention)
    loop = flops_per_token(model, context=4096, n_loops=5)
    once = flops_per_token(model, context=4096, n_loops=4)
    partial = flops_per_token(model, context=4096, n_loops=5, n_grad_loops=2, recompute=True)
    one_loop = loop.forward + loop.attention - once.forward - once.attention
    assert loop.training - partial.training == pytest.approx(2 * 3 * one_loop)
    assert partial.recompute == pytest.approx(2 * one_loop)


def test_trillion_costs_a_tenth_of_the_usual_layout():
    """3.9 TFLOP per token at full depth; the depth distribution needs under a fifth of it."""
    config = load_config("1t").config
    full = flops_per_token(config.model, context=config.training.seq_len, n_loops=64)
    assert 3.5e12 < full.training < 4.2e12
    assert expected_flops_per_token(config, 8).training < full.training / 5
    assert cache_bytes_per_token(config.model, 64) == (8 + 8 * 64) * (512 + 64) * 2


@pytest.mark.parametrize("tool", ["preset_table", "config_schema"])
def test_generated_files_are_current(tool, monkeypatch, capsys):
    module = load_main(f"tools/{tool}.py")
    monkeypatch.setattr("sys.argv", [tool, "--check"])
    assert module.main() == 0, capsys.readouterr().out
