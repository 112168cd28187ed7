"""Names of tensors here and in Hugging Face files, declared once and read in both directions."""

import re
from collections.abc import Iterator

from mythos_ds.errors import TensorMismatchError

_OUTPUT = ("attn.o.weight", "self_attn.o_proj.weight")
LAYER_NORMS = {
    "before": (
        ("attn_norm.weight", "input_layernorm.weight"),
        ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ),
    "after": (
        ("attn_norm.weight", "post_attention_layernorm.weight"),
        ("ffn_norm.weight", "post_feedforward_layernorm.weight"),
    ),
}
"""By ModelConfig.norm_placement; named as in OLMo 2 where they stand after."""
_GROUPED = (
    ("attn.q.weight", "self_attn.q_proj.weight"),
    ("attn.k.weight", "self_attn.k_proj.weight"),
    ("attn.v.weight", "self_attn.v_proj.weight"),
    ("attn.q_norm.weight", "self_attn.q_norm.weight"),
    ("attn.k_norm.weight", "self_attn.k_norm.weight"),
    *((f"attn.{name}.bias", f"self_attn.{name}_proj.bias") for name in "qkvo"),
)
_LATENT = (
    ("attn.q_proj.weight", "self_attn.q_proj.weight"),
    ("attn.q_down.weight", "self_attn.q_a_proj.weight"),
    ("attn.q_norm.weight", "self_attn.q_a_layernorm.weight"),
    ("attn.q_up.weight", "self_attn.q_b_proj.weight"),
    ("attn.kv_down.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    ("attn.kv_norm.weight", "self_attn.kv_a_layernorm.weight"),
    ("attn.kv_up.weight", "self_attn.kv_b_proj.weight"),
)
_SWIGLU = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
_ROUTER = (
    ("weight", "weight"),
    ("bias", "e_score_correction_bias"),
    ("loop_bias", "loop_correction_bias"),
    ("loop_updates", "loop_updates"),
)
_LOOP = (
    "injection.log_A", "injection.log_dt", "injection.dt_bias", "injection.B", "loop_embedding.gain",
    "lora.down.weight", "lora.up.weight", "lora.scale", "norm.weight",
)  # fmt: skip
LEFT_OUT = ("recurrent.gate.",)
"""What a trained gate adds; the model's forward does not use it."""


def _pairs(latent: bool, norms: str) -> Iterator[tuple[str, str]]:
    yield from (
        ("embed.weight", "model.embed_tokens.weight"),
        ("prelude_norm.weight", "model.prelude_norm.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    )
    yield from ((f"recurrent.{name}", f"model.recurrent.{name}") for name in _LOOP)
    layer = (*LAYER_NORMS[norms], _OUTPUT, *(_LATENT if latent else _GROUPED))
    for part in ("prelude", "coda", "recurrent.layers"):
        yield from ((f"{part}.#.{a}", f"model.{part}.#.{b}") for a, b in layer)
    for part in ("prelude", "coda"):
        yield from ((f"{part}.#.ffn.{a}.weight", f"model.{part}.#.mlp.{b}.weight") for a, b in _SWIGLU)
    ours, theirs = "recurrent.layers.#", "model.recurrent.layers.#"
    yield from ((f"{ours}.moe.router.{a}", f"{theirs}.mlp.router.{b}") for a, b in _ROUTER)
    yield from (
        (f"{ours}.moe.shared_experts.{a}.weight", f"{theirs}.mlp.shared_experts.{b}.weight") for a, b in _SWIGLU
    )
    yield from ((f"{ours}.moe.experts.{a}", f"{theirs}.mlp.experts.*.{b}.weight") for a, b in _SWIGLU)


class Names:
    """The rules for a model with grouped-query (latent=False) or latent attention, and norms before or after. Both
    directions raise CheckpointError for a name that no rule knows."""

    def __init__(self, latent: bool, norms: str = "before"):
        rules = list(_pairs(latent, norms))
        self._to_hf, self._from_hf = dict(rules), {theirs: ours for ours, theirs in rules}

    def to_hf(self, name: str) -> str:
        """The name in Hugging Face files; `*` stands for the number of an expert."""
        return _translate(name, self._to_hf)

    def from_hf(self, name: str) -> tuple[str, int | None]:
        """Our name, and the expert's number where it is one of a stack."""
        found = re.search(r"\.mlp\.experts\.(\d+)\.", name)
        if found is None:
            return _translate(name, self._from_hf), None
        return _translate(name.replace(found.group(0), ".mlp.experts.*."), self._from_hf), int(found.group(1))


def _translate(name: str, rules: dict[str, str]) -> str:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    pattern = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
    if pattern not in rules:
        raise TensorMismatchError(f"{name}: a tensor that has no counterpart in the other format")
    return rules[pattern] if number is None else rules[pattern].replace("#", number.group(0))
