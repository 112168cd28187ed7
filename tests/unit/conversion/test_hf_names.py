"""Names of tensors in both formats."""

import pytest

from mythos_ds.conversion.hf_names import LEFT_OUT, Names
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.whole_model import expected_specs
from tests.helpers.toy_model import toy_model

GQA = {
    "attn_type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kv_lora_rank": None, "q_lora_rank": None,
    "qk_nope_head_dim": None, "qk_rope_head_dim": None, "v_head_dim": None, "qk_norm": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, GQA, {"halting": "gate"}, {"injection": "post", "discretisation": "direct"}]
)
def test_every_tensor_has_one_name_and_comes_back(changes):
    config = toy_model(**changes)
    names = Names(config.attn_type == "mla")
    ours = [name for name in expected_specs(config) if not name.startswith(LEFT_OUT)]
    theirs = [names.to_hf(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    for name, translated in zip(ours, theirs, strict=True):
        expert = 13 if "*" in translated else None
        assert names.from_hf(translated.replace("*", "13")) == (name, expert)


def test_layer_numbers_are_kept():
    names = Names(latent=False)
    assert names.to_hf("prelude.11.ffn.w2.weight") == "model.prelude.11.mlp.down_proj.weight"
    given = "model.recurrent.layers.7.mlp.experts.7.up_proj.weight"
    assert names.from_hf(given) == ("recurrent.layers.7.moe.experts.w3", 7)


@pytest.mark.parametrize(
    ("latent", "name"),
    [
        (False, "recurrent.halting.weight"),
        (False, "prelude.0.attn.kv_down.weight"),
        (True, "prelude.0.attn.k.weight"),
        (False, "prelude.0.ffn.w4.weight"),
        (False, "optimizer.step"),
    ],
)
def test_an_unknown_name_is_refused(latent, name):
    with pytest.raises(CheckpointError, match="no counterpart"):
        Names(latent).to_hf(name)
    with pytest.raises(CheckpointError, match="no counterpart"):
        Names(latent).from_hf(f"model.{name}")
