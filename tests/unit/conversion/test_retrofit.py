"""Dense models of the Llama family cut into prelude, recurrent block and coda, with upcycled feed-forwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    ],
)
def test_a_cut_that_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    cut = replace(CUT, **change)
    with pytest.raises(ConfigError, match=message):
        retrofit_config({**_SIZES, "model_type": "llama"}, cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: given 'qwen2'"),
        ({"attention_bias": True}, "attention_bias: given True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: given 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type: given 'llama3'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window: given 4096"),
        ({"hidden_act": "gelu"}, "hidden_act: given 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: missing"),
    ],
)
def test_a_source_that_cannot_be_expressed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retrofit_config({**_SIZES, "model_type": "llama", **change}, CUT)


def test_a_bias_in_the_weights_is_refused(tmp_path: Path) -> None:
    _source(tmp_path / "hf", attention_bias=True)
    hf = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"attention_bias": False}
    with pytest.raises(CheckpointError, match=r"bias: nothing here stands for it"):
        Retrofitted(open_weights(tmp_path / "hf"), hf, CUT)
