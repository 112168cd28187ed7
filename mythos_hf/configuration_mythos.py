"""Configuration of the recurrent-depth mixture-of-experts model for Hugging Face transformers."""

from typing import TypeVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

_ALLOWED = {
    "attention_type": ("gqa", "mla"),
    "scoring_func": ("sigmoid", "softmax"),
    "injection": ("pre", "post"),
    "discretisation": ("euler", "zoh", "direct"),
    "state_dtype": ("float32", "bfloat16"),
    "initial_state": ("zeros", "embedding"),
    "loop_embedding": ("scaled", "raw", "none"),
    "lora_target": ("input", "output"),
    "hidden_act": ("silu",),
    "qk_norm_span": ("head", "all"),
    "attention_biases": ("none", "qkv", "all"),
    "norm_placement": ("before", "after"),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DEPTH = ("num_prelude_layers", "num_recurrent_layers", "num_coda_layers", "n_loops")
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_Setting = TypeVar("_Setting")


def filled(setting: _Setting | None) -> _Setting:
    """The value of a setting that may be left out, but that a made configuration has."""
    assert setting is not None
    return setting


@strict
class MythosConfig(PreTrainedConfig):
    """A prelude of dense layers, a block of mixture-of-experts layers that runs n_loops times, and a coda.

    `num_hidden_layers` is the effective depth, num_prelude_layers + n_loops * num_recurrent_layers + num_coda_layers:
    one cache entry for each. It follows n_loops, also where that is set later. Entries are ordered prelude, coda, loop
    by loop, so that more loops only append. n_loops is mean_recurrence unless given. Raises ValueError for a value that
    the model does not have.
    """

    model_type = "mythos"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_prelude_layers: int = 1
    num_recurrent_layers: int = 1
    num_coda_layers: int = 1
    n_loops: int | None = None
    max_loops: int = 16
    mean_recurrence: int = 4
    num_hidden_layers: int | None = None

    attention_type: str = "gqa"
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    qk_norm_span: str = "head"
    attention_biases: str = "none"
    norm_placement: str = "before"
    no_rope_layers: list[int] | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    max_position_embeddings: int = 4096

    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    n_shared_experts: int = 1
    shared_expert_intermediate_size: int | None = None
    scoring_func: str = "sigmoid"
    routed_scaling_factor: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None

    injection: str = "pre"
    discretisation: str = "euler"
    state_dtype: str = "float32"
    initial_state: str = "zeros"
    prelude_norm: bool = True
    loop_embedding: str = "scaled"
    lora_rank: int = 0
    lora_target: str = "input"

    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: given {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.n_loops is None:
            self.n_loops = self.mean_recurrence
        if self.attention_type == "mla":
            missing = [name for name in _LATENT if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{missing[0]}: not given; attention_type 'mla' needs it")
            # Keys and values are cached per head; values are padded to the keys' width.
            self.head_dim = filled(self.qk_nope_head_dim) + filled(self.qk_rope_head_dim)
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        kinds = _ROPE_TYPES if self.attention_type == "gqa" else _ROPE_TYPES[:1]
        if self.rope_parameters.get("rope_type", "default") not in kinds:
            raise ValueError(f"rope_parameters: given {self.rope_parameters}; allowed: rope_type {', '.join(kinds)}")
        self.no_rope_layers = self.no_rope_layers or []
        self._follow_loops()
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        # Loading with n_loops=8, or an engine's override, sets it after __post_init__.
        if name in _DEPTH and getattr(self, "n_loops", None) is not None:
            self._follow_loops()

    def _follow_loops(self):
        n_loops = filled(self.n_loops)
        if n_loops < 1:
            raise ValueError(f"n_loops: given {n_loops}; allowed: 1 or more")
        looped = n_loops * self.num_recurrent_layers
        self.num_hidden_layers = self.num_prelude_layers + looped + self.num_coda_layers
