"""The configuration that transformers reads."""

from typing import Any

import pytest

pytest.importorskip("transformers")
from mythos_hf import MythosConfig


def test_depth_follows_loops_however_they_are_set(tmp_path):
    config = MythosConfig(num_prelude_layers=2, num_recurrent_layers=3, num_coda_layers=1, mean_recurrence=5)
    assert (config.n_loops, config.num_hidden_layers) == (5, 18)
    config.n_loops = 2
    assert config.num_hidden_layers == 9
    config.update({"n_loops": 3})
    assert config.num_hidden_layers == 12
    config.save_pretrained(tmp_path)
    assert MythosConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert MythosConfig.from_pretrained(tmp_path, n_loops=7).num_hidden_layers == 24
    with pytest.raises(ValueError, match="n_loops"):
        config.n_loops = 0


@pytest.mark.parametrize(
    "values",
    [
        {"attention_type": "linear"},
        {"scoring_func": "relu"},
        {"injection": "none"},
        {"hidden_act": "gelu"},
        {"n_loops": 0},
        {"attention_type": "mla", "kv_lora_rank": 8},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {"norm_placement": "both"},
        {"attention_biases": "o"},
        {"qk_norm_span": "two"},
    ],
)
def test_what_the_model_does_not_have_is_refused(values):
    with pytest.raises(ValueError, match="qk_nope_head_dim" if values.get("kv_lora_rank") else next(iter(values))):
        MythosConfig(**values)


def test_latent_heads_are_as_wide_as_their_keys():
    widths: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
    config = MythosConfig(attention_type="mla", num_attention_heads=2, **widths)
    assert (config.head_dim, config.num_key_value_heads) == (10, 2)
