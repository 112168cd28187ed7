"""Small random models of each dense family, saved by transformers: cut, exported and run again, with equal logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mythos_ds
from mythos_ds.config.schema import RopeScaling
from mythos_ds.model.rope import Rotary
from mythos_ds.weights.model_folder import load_model, read_config, read_metadata

transformers = pytest.importorskip("transformers")
import mythos_hf
from mythos_hf.rotary_mythos import rotary_tables

CUT: dict[str, Any] = {"prelude": 1, "recurrent": 2, "coda": 1, "granularity": 2, "experts": 4, "experts_per_token": 2}
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3, as published": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn, own scale": {**YARN, "attention_factor": 1.7, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, two scales": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "head_dim": 16}),
    **{f"llama, {a}": ("llama", {"rope_parameters": {**keys, "rope_theta": 500.0}}) for a, keys in SCALINGS.items()},
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral, a window as wide as the context": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 500.0}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmo2 with biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "widths that the grouped matmul cannot take": (
        "qwen2", {"hidden_size": 30, "intermediate_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "smollm3": ("smollm3", {}),  # its layer 3, and any fourth one, has no RoPE
    "smollm3, most layers without RoPE": ("smollm3", {"no_rope_layers": [0, 0, 1, 0, 0], "attention_bias": True}),
}  # fmt: skip


def make_source(folder: Path, kind: str, options: dict[str, Any]) -> Any:
    """A random model saved to `folder`; weights large enough that a wrong one shows."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def tokens_of(length: int) -> Tensor:
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))


def cut(model: Any) -> Any:
    """The source without the layers that CUT drops."""
    taken = [0, 2, 3, 4]
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in taken])
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_loop_is_the_source_and_the_export_is_the_model(name: str, tmp_path: Path) -> None:
    """On and beyond the length before RoPE was stretched (16), up to the context."""
    kind, options = FAMILIES[name]
    source = cut(make_source(tmp_path / "source", kind, options))
    mythos_ds.convert(tmp_path / "source", tmp_path / "ours", from_format="hf", to_format="mythos", **CUT)
    ours = load_model(tmp_path / "ours")
    mythos_ds.convert(tmp_path / "ours", tmp_path / "hf", dtype="float32")
    exported = mythos_hf.MythosForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert exported.config.max_position_embeddings == 64
    with torch.inference_mode():
        for length in (12, 64):
            tokens = tokens_of(length)
            expected = source(tokens, use_cache=False).logits
            assert (ours(tokens, n_loops=1) - expected).abs().max() <= 2e-5 * expected.abs().max(), length
            for loops in (1, 3):
                logits = ours(tokens, n_loops=loops)
                assert (exported(tokens, n_loops=loops).logits - logits).abs().max() <= 1e-5 * logits.abs().max(), loops
        for loops in (1, 3):
            made = tokens_of(12)[:1]
            settings = {"max_new_tokens": 16, "do_sample": False, "n_loops": loops, "eos_token_id": None}
            theirs = exported.generate(made, **settings)
            for _ in range(16):
                made = torch.cat([made, ours(made, n_loops=loops)[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(theirs, made), loops
    mythos_ds.convert(tmp_path / "hf", tmp_path / "back", from_format="hf", to_format="mythos")
    assert read_config(tmp_path / "back").model_dump(exclude={"init_std"}) == read_config(tmp_path / "ours").model_dump(
        exclude={"init_std"}
    ) | {"head_dim": ours.config.resolved_head_dim, "shared_expert_dim": ours.config.resolved_shared_dim}
    assert read_metadata(tmp_path / "back")["context_length"] == 64


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("width", [8, 64, 128])
def test_rope_is_that_of_transformers(name: str, width: int) -> None:
    """The formulas here against transformers' own, on and far beyond the original length."""
    keys = SCALINGS[name]
    longest = 4 * keys.get("original_max_position_embeddings", 64)
    positions = torch.cat([torch.arange(64), torch.arange(0, longest, 5), torch.tensor([longest, 131071])])[None]
    config = mythos_hf.MythosConfig(head_dim=width, rope_parameters={**keys, "rope_theta": 500000.0})
    theirs = rotary_tables(positions, config)
    ours = Rotary.at(positions, width, 500000.0, False, RopeScaling(**keys))
    for mine, expected in zip((ours.cos, ours.sin), theirs, strict=True):
        assert (mine - expected).abs().max() <= 1e-6
    plain = Rotary.at(positions, width, 500000.0, False)
    assert (ours.cos - plain.cos).abs().max() > 0.1, "stretching does something"
