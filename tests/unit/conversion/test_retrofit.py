"""Dense models of the Llama family cut into prelude, recurrent block and coda, with upcycled feed-forwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mythos_ds.config.schema import RopeScaling
from mythos_ds.conversion.dense_source import FAMILIES, model_fields, unread_fields, value_of
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel, write_config
from mythos_ds.conversion.retrofit import Cut, Retrofitted, describe, retrofit_config
from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model
from mythos_ds.weights.pickled import open_weights
from mythos_ds.weights.writer import write_tensors

transformers = pytest.importorskip("transformers")
CUT = Cut(prelude=2, recurrent=3, coda=1, n_experts=8, granularity=4, experts_per_token=4)
TOKENS = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(5))
_SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


def _source(folder: Path, kind: str = "llama", **options: Any) -> Any:
    """A random model saved to `folder`; weights large enough that a wrong one shows."""
    torch.manual_seed(1)
    extras: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}, "llama": {}}
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **theta, **extras[kind], **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def _retrofit(folder: Path, output: Path, cut: Cut = CUT) -> MythosModel:
    hf = json.loads((folder / "config.json").read_text())
    config = retrofit_config(hf, cut)
    write_tensors(WholeModel(Retrofitted(open_weights(folder), hf, cut), config, None, ROUTER_BUFFERS), output)
    write_config(output, config, {}, folder / "tokenizer.model")
    return load_model(output)


def _cut_logits(model: Any, cut: Cut) -> Tensor:
    """The source without its dropped layers."""
    parts = cut.layers(len(model.model.layers))
    kept = [*parts["prelude"], *parts["recurrent"], *parts["coda"]]
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True, "head_dim": 8}), ("mistral", {}), ("qwen3", {})],
)
def test_the_first_loop_is_the_cut_source(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    source = _source(tmp_path / "hf", kind, **options)
    ours = _retrofit(tmp_path / "hf", tmp_path / "ours")
    expected = _cut_logits(source, CUT)
    with torch.inference_mode():
        assert (ours(TOKENS, n_loops=1) - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert (ours(TOKENS, n_loops=3) - expected).abs().max() > 1e-2, "the loop does something"


@pytest.mark.parametrize("copies_used", [1, 2])
def test_whole_copies_compute_the_feed_forward(tmp_path: Path, copies_used: int) -> None:
    """However many copies are used, and whatever the router says."""
    source = _source(tmp_path / "hf")
    cut = replace(CUT, n_experts=12, experts_per_token=4 * copies_used)
    ours = _retrofit(tmp_path / "hf", tmp_path / "ours", cut)
    x = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(2))
    for layer, moe in enumerate(ours.moe_layers()):
        context: ForwardContext = ours.make_context(TOKENS, None, None, 1)
        expected = source.model.layers[4 + layer].mlp(x)
        assert (moe(x, 0, context) - expected).abs().max() <= 1e-5 * expected.abs().max()
        chosen = moe.router(x.flatten(0, 1), LoopIndex(0)).indices.sort(-1).values
        assert torch.equal(chosen // 4 * 4 + torch.arange(4).repeat(copies_used), chosen), "whole copies"
        assert len((chosen // 4).unique()) == 3, "the router uses all copies"


@pytest.mark.parametrize("decay", [1e-9, 0.01, Cut.decay, 0.2, 0.9, 0.9998])
def test_the_injection_starts_with_the_decay_that_is_asked_for(tmp_path: Path, decay: float) -> None:
    _source(tmp_path / "hf")
    ours = _retrofit(tmp_path / "hf", tmp_path / "ours", replace(CUT, decay=decay))
    with torch.no_grad():
        a, b = ours.recurrent.injection.coefficients()
    assert (a.double() - decay).abs().max() <= 1e-6
    assert (b - 1).abs().max() <= 1e-6, "the first loop is the source's whatever A is"


def test_which_layers_are_taken_is_said() -> None:
    assert CUT.layers(8) == {"prelude": [0, 1], "recurrent": [4, 5, 6], "coda": [7], "dropped": [2, 3]}
    assert replace(CUT, recurrent_from=2).layers(8)["dropped"] == [5, 6]
    lines = describe(CUT, 8)
    assert lines[:4] == [
        "prelude: source layers 0-1",
        "recurrent: source layers 4-6",
        "coda: source layers 7",
        "dropped: source layers 2-3",
    ]
    assert "2 copies of each feed-forward in 4 parts, 1 copies used" in lines[4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prelude": 6}, r"--recurrent 3.*at most the 8"),
        ({"coda": -1}, "--coda: given -1"),
        ({"recurrent_from": 1}, "--recurrent-from: given 1; allowed: 2 to 4"),
        ({"granularity": 5}, "--granularity: given 5; allowed: divisors of intermediate_size = 64; nearest: 4 or 8"),
        ({"n_experts": 6}, "--experts: given 6; allowed: multiples of --granularity = 4; nearest: 4"),
        ({"experts_per_token": 5}, "--experts-per-token: given 5"),
        ({"mean_recurrence": 17}, "--mean-recurrence: given 17"),
        ({"context_length": 65}, "--context-length: given 65; allowed: 1 to .* = 64; nearest: 64"),
        ({"decay": 0.0}, "--decay: given 0.0; allowed: above 0, up to 0.9998; nearest: 0.05"),
        ({"decay": 1.0}, "--decay: given 1.0; allowed: above 0, up to 0.9998; nearest: 0.9998"),
        ({"decay": float("nan")}, "--decay: given nan"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    cut = replace(CUT, **change)
    with pytest.raises(ConfigError, match=message):
        retrofit_config({**_SIZES, "model_type": "llama"}, cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: given 'gemma2'; allowed: llama, mistral, qwen2, qwen3, olmo2, smollm3"),
        ({"mlp_bias": True}, "mlp_bias: given True; allowed: False"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias: given True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: given 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: Field required"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "rope_type: given 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "given by layer type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: given 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling: given 'linear'; allowed: an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500.0}},
            "given beside rope_parameters, whose rope_theta 500.0 transformers then ignores",
        ),
        ({"max_position_embeddings": None}, "max_position_embeddings: missing"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers: given '8'; allowed: an integer"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: given 30.0"),
        ({"model_type": "mistral", "sliding_window": 32}, "given 32, shorter than .* 64 .*: --context-length 32"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window: given 4096"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 7},
            "sliding_window: given 32",
        ),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 32},
            "sliding_window: given 32",  # in the layers without RoPE
        ),
        ({"hidden_act": "gelu"}, "hidden_act: given 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers: given 'x'; allowed: an integer"),
        ({"intermediate_size": [1]}, "intermediate_size: given .* an integer"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta: given 'x'; allowed: a number"),
        ({"layer_types": 5}, "layer_types: given 5; allowed: a list"),
        ({"vocab_size": 1}, "model.vocab_size: Input should be .*, given 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 given; allowed: divisors of n_heads = 4"),
        ({"head_dim": 7}, "head_dim: 7 given; allowed: even numbers"),
    ],
)
def test_a_source_that_cannot_be_expressed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retrofit_config({**_SIZES, "model_type": "llama", **change}, CUT)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "mistral", "max_position_embeddings": 4096},
        {"model_type": "qwen2", "sliding_window": 32},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 8},
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 32, "no_rope_layers": [1] * 8},
    ],
)
def test_a_window_that_changes_nothing_is_taken(change: dict[str, Any]) -> None:
    retrofit_config({**_SIZES, **change}, CUT)
    windowed = {**_SIZES, "model_type": "mistral", "sliding_window": 32}
    retrofit_config(windowed, replace(CUT, context_length=32))


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    for kind in FAMILIES:
        kept = {name: value for name, value in _SIZES.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
        known = transformers.AutoConfig.for_model(kind, **kept)
        source = {**kept, "model_type": kind, "rms_norm_eps": known.rms_norm_eps}
        del source["max_position_embeddings"]
        fields = model_fields({**source, "num_attention_heads": 32}, range(8))
        assert fields["no_rope_layers"] == ((3, 7) if kind == "smollm3" else ())
        assert (
            fields["n_kv_heads"] == transformers.AutoConfig.for_model(kind, num_attention_heads=32).num_key_value_heads
        )
        assert fields["rope_theta"] == known.rope_parameters["rope_theta"]
        assert fields["tie_embeddings"] == known.tie_word_embeddings
        assert fields["head_dim"] == (128 if kind == "qwen3" else None)
        assert value_of(source, "max_position_embeddings") == type(known)().max_position_embeddings
        assert value_of(source, "sliding_window") == (4096 if kind in ("mistral", "qwen2", "qwen3") else None)


def test_a_truncate_of_null_is_false_as_in_transformers() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for given, taken in (({}, None), ({"truncate": None}, False), ({"truncate": True}, True)):
        source = {**_SIZES, "model_type": "llama", "rope_parameters": {**rope, **given}}
        assert model_fields(source, ())["rope_scaling"].truncate is taken


def test_original_lengths_are_found_where_transformers_finds_them() -> None:
    rope = {"type": "yarn", "factor": 4.0, "mscale": 0.0, "beta_fast": None}
    for extra, length in (({}, 64), ({"original_max_position_embeddings": 16}, 16)):
        scaling = model_fields({**_SIZES, "model_type": "llama", "rope_scaling": rope, **extra}, ())["rope_scaling"]
        assert scaling == RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=length)


def test_fields_that_nothing_knows_are_named() -> None:
    source = {**_SIZES, "model_type": "llama", "use_cache": True, "new_trick": 3, "_name_or_path": "x"}
    rope = {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}
    assert unread_fields(source) == ["new_trick"]
    assert unread_fields({**source, "rope_scaling": rope}) == ["new_trick", "rope_scaling.beta_fast"]
    for kind in FAMILIES:
        assert unread_fields(transformers.AutoConfig.for_model(kind, **_SIZES).to_dict()) == [], kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.5.mlp.up_proj.weight"), r"layers\.5\.mlp\.up_proj\.weight: not in the given"),
        (
            lambda w: w.pop("lm_head.weight"),
            r"lm_head\.weight: not in the given weights; if .* tie_word_embeddings true",
        ),
        (
            lambda w: w.update({"model.extra.weight": torch.ones(2)}),
            r"model\.extra\.weight: nothing here stands for it",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(47)}), r"model\.norm\.weight: has the shape \(47,\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}),
            r"model\.norm\.weight: is torch.int32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    _source(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        Retrofitted(open_weights(tmp_path / "hf"), hf, CUT)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.6.mlp.down_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_the_sources_name(tmp_path: Path, name: str, value: float) -> None:
    _source(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights[name][3, 1] = value
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: has values that are not finite"):
        _retrofit(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()


def test_a_head_beside_the_embedding_that_should_be_it(tmp_path: Path) -> None:
    """The same is taken, another is refused until the configuration says that they are two."""
    source = _source(tmp_path / "hf", tie_word_embeddings=True)
    path, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    _retrofit(tmp_path / "hf", tmp_path / "same")
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(3))
    save_file({**weights, "lm_head.weight": head}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from .*; write tie_word_embeddings false"):
        _retrofit(tmp_path / "hf", tmp_path / "other")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    ours = _retrofit(tmp_path / "hf", tmp_path / "untied")
    source.lm_head.weight = nn.Parameter(head)
    expected = _cut_logits(source, CUT)
    with torch.inference_mode():
        assert (ours(TOKENS, n_loops=1) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_and_mixed_types(tmp_path: Path, mixed: bool) -> None:
    source = _source(tmp_path / "hf")
    source.half().save_pretrained(tmp_path / "hf")
    if mixed:
        path = tmp_path / "hf" / "model.safetensors"
        wide = {name: value.float() if "mlp.up" in name else value for name, value in load_file(path).items()}
        save_file(wide, path, {"format": "pt"})
    ours = _retrofit(tmp_path / "hf", tmp_path / "ours")
    wide_source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = _cut_logits(wide_source, CUT)
    with torch.inference_mode():
        assert (ours(TOKENS, n_loops=1) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_bias_in_the_weights_is_refused(tmp_path: Path) -> None:
    _source(tmp_path / "hf", attention_bias=True)
    hf = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"attention_bias": False}
    with pytest.raises(CheckpointError, match=r"bias: nothing here stands for it"):
        Retrofitted(open_weights(tmp_path / "hf"), hf, CUT)
