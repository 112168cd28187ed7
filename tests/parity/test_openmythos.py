"""Same weights, same logits and gradients as open-mythos 0.5.0, run as the oracle."""

from collections.abc import Mapping
from typing import Any

import open_mythos.main as oracle
import pytest
import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.openmythos import openmythos_config, openmythos_source
from mythos_ds.errors import CheckpointError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.reader import InMemorySource

MAX_LOOPS = 4


def converted_tensors(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """An open-mythos state_dict (or its gradients by the same names) under our parameter names, as copies."""
    source = openmythos_source(InMemorySource(theirs), config)
    return {name: source.read(name).clone() for name in source.specs()}


def _pair(attn_type: str, *, halt_bias: float | None = None) -> tuple[Any, MythosModel]:
    torch.manual_seed(7)
    source = oracle.MythosConfig(
        vocab_size=61,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=32,
        max_loop_iters=MAX_LOOPS,
        prelude_layers=2,
        coda_layers=1,
        attn_type=attn_type,
        kv_lora_rank=24,
        q_lora_rank=20,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
        n_experts=8,
        n_shared_experts=2,
        n_experts_per_tok=3,
        expert_dim=16,
        lora_rank=4,
    )
    theirs = oracle.OpenMythos(source)
    with torch.no_grad():  # away from their tiny initial values, so that every part matters
        for name, parameter in theirs.named_parameters():
            if name.startswith("recurrent.") or "norm" in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
        if halt_bias is not None:
            theirs.recurrent.act.halt.bias.fill_(halt_bias)
    config = openmythos_config(source)
    ours = MythosModel(config)
    missing, unexpected = ours.load_state_dict(converted_tensors(theirs.state_dict(), config), strict=False)
    assert not unexpected
    buffers = ("router.bias", "router.loop_bias", "router.loop_updates")
    assert all(name == "lm_head.weight" or name.endswith(buffers) for name in missing)
    return theirs, ours


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
@pytest.mark.parametrize("n_loops", [1, 4, 9])
@pytest.mark.parametrize("halt_bias", [None, -4.0])
def test_logits_and_gradients_equal_the_oracle(attn_type: str, n_loops: int, halt_bias: float | None) -> None:
    theirs, ours = _pair(attn_type, halt_bias=halt_bias)
    tokens = torch.randint(0, 61, (3, 24))
    expected = theirs(tokens, n_loops=n_loops)
    logits = ours(tokens, n_loops=n_loops)
    assert (logits - expected).abs().max() <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).mean().backward()
    (logits * weight).mean().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    converted = converted_tensors(gradients, ours.config)
    ours_by_name = dict(ours.named_parameters())
    assert converted.keys() == ours_by_name.keys()
    for name, want in converted.items():
        got = ours_by_name[name].grad
        got = torch.zeros_like(want) if got is None else got
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9, name


def test_halting_really_happens_and_really_does_not() -> None:
    tokens = torch.randint(0, 61, (2, 16))
    default, _ = _pair("gqa", halt_bias=3.0)
    assert torch.equal(default(tokens, n_loops=9), default(tokens, n_loops=16)), "halted: more loops change nothing"
    patient, _ = _pair("gqa", halt_bias=-4.0)
    assert not torch.equal(patient(tokens, n_loops=4), patient(tokens, n_loops=9))


def test_a_missing_tensor_is_named() -> None:
    theirs, ours = _pair("mla")
    weights = dict(theirs.state_dict())
    del weights["recurrent.lora.B"]
    with pytest.raises(CheckpointError, match=r"recurrent\.lora\.B"):
        converted_tensors(weights, ours.config)


def test_a_router_bias_is_refused() -> None:
    theirs, ours = _pair("mla")
    weights = dict(theirs.state_dict())
    weights["recurrent.block.ffn.router_bias"] = torch.ones(8)
    with pytest.raises(CheckpointError, match="router_bias"):
        converted_tensors(weights, ours.config)
