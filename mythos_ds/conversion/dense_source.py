"""What a dense Hugging Face model of the Llama family computes, read from its config.json: as fields of ModelConfig, or
as reasons why the layers here cannot compute it. Absent keys mean what they mean in transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos_ds.config.rules.model import SCALING_KEYS, scaling_problem
from mythos_ds.config.schema import RopeScaling
from mythos_ds.weights.pickled import open_weights
from mythos_ds.weights.prefixes import without_prefix
from mythos_ds.weights.reader import TensorSource

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "olmo2": {"max_position_embeddings": 2048},
    "smollm3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""What transformers takes where a key is absent, if that is not null, false or what all families share."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
_READ = {
    *_SIZES, "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "rope_theta",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings", "max_position_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "scale_emb": (1.0,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_logn_attn": (False,),
    "use_dynamic_ntk": (False,),
    "use_mrope": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
"""Keys of what the layers here do not have, and the values, besides null, at which it computes nothing."""
_MOST = {"num_hidden_layers": 10_000, "hidden_size": 1 << 24, "intermediate_size": 1 << 26, "vocab_size": 1 << 31}
"""Layers are counted up to their number, and tensors planned by their sizes."""
NO_COMPUTATION = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unk_token_id", "use_bfloat16", "use_cache",
}  # fmt: skip
_SCALED = ("linear", "llama3", "yarn")
_KINDS: tuple[tuple[str, tuple[type, ...], tuple[str, ...]], ...] = (
    ("an integer", (int,), (
        "num_hidden_layers", "intermediate_size", "max_position_embeddings", "original_max_position_embeddings",
        "sliding_window", "max_window_layers", "no_rope_layer_interval",
    )),
    ("a number", (int, float), ("rope_theta",)),
    ("a list", (list, tuple), ("layer_types", "no_rope_layers")),
    ("an object", (dict,), ("rope_scaling", "rope_parameters")),
)  # fmt: skip
"""What a key's value is, if it is not null; the sizes beside these go into ModelConfig as they are."""


def value_of(source: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or what its absence means."""
    return source.get(key, _ABSENT[source["model_type"]].get(key))


def unread_fields(source: Mapping[str, Any]) -> list[str]:
    """The keys that nothing here knows, so that what they say is not looked at."""
    known = _READ | NO_COMPUTATION | set(_NEUTRAL)
    unknown = [key for key in source if key not in known and not key.startswith("_")]
    key, kind, given, _ = _rope_keys(source)
    unknown += [f"{key}.{name}" for name in given if name not in _keys_of(kind)]
    return sorted(unknown)


def unread_note(fields: Sequence[str]) -> list[str]:
    """What there is to say of such keys."""
    return [f"{', '.join(fields)}: not known here, and not read from the configuration"] if fields else []


def source_problems(source: Mapping[str, Any]) -> list[str]:
    """Why the layers here cannot compute such a model, whichever of its layers are taken."""
    kind = source.get("model_type")
    if kind not in FAMILIES:
        return [f"model_type: given {kind!r}; allowed: {', '.join(FAMILIES)} (dense)"]
    if problems := _wrong_kinds(source):
        return problems
    problems = [f"{key}: missing" for key in _SIZES if source.get(key) is None]
    for key, most in _MOST.items():
        if isinstance(given := source.get(key), int) and not 1 <= given <= most:
            problems.append(f"{key}: given {given}; allowed: 1 to {most}")
    neutral = dict(_NEUTRAL)
    if kind == "mistral":  # has none, whatever the key says; a fork may
        neutral["attention_bias"] = (False,)
    for key, values in neutral.items():
        if source.get(key) is not None and source[key] not in values:
            allowed = repr(values[0]) if values else "null"
            problems.append(f"{key}: given {source[key]!r}; allowed: {allowed}; it would change the computation")
    odd = sorted(set(source.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    if odd:
        problems.append(f"layer_types: given {odd[0]!r}; allowed: 'full_attention'")
    if value_of(source, "max_position_embeddings") is None:
        return [*problems, "max_position_embeddings: missing"]
    return problems + _rope(source)[1]


def _wrong_kinds(source: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key}: given {value!r}; allowed: {words}"
        for words, kinds, keys in _KINDS
        for key in keys
        if (value := source.get(key)) is not None and (isinstance(value, bool) or not isinstance(value, kinds))
    ]
    theta = {} if problems else source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(theta.get("rope_theta", 1.0), (int, float, type(None))):
        problems.append(f"rope_parameters.rope_theta: given {theta['rope_theta']!r}; allowed: a number")
    return problems


def layer_problems(source: Mapping[str, Any], taken: Sequence[int], context: int) -> list[str]:
    """Why the layers here cannot compute those of the source that are `taken`, over `context` tokens."""
    window = _window(source, taken)
    if window is None or window >= context:
        return []
    return [
        f"sliding_window: given {window}, shorter than the context of {context} tokens; attention here sees all of "
        f"them; allowed: at least the context. For texts of up to {window} tokens: --context-length {window}"
    ]


def model_fields(source: Mapping[str, Any], taken: Sequence[int]) -> dict[str, Any]:
    """The fields of ModelConfig that say what the layers of the source that are `taken`, in order, compute."""
    unrotated, kind = _unrotated(source), source["model_type"]
    theta, scaling = _rope(source)[0]
    biases = "qkv" if kind == "qwen2" else "all" if source.get("attention_bias") else "none"
    return {
        "vocab_size": source["vocab_size"],
        "dim": source["hidden_size"],
        "ffn_dim": source["intermediate_size"],
        "attn_type": "gqa",
        "n_heads": source["num_attention_heads"],
        "n_kv_heads": value_of(source, "num_key_value_heads") or source["num_attention_heads"],
        "head_dim": value_of(source, "head_dim"),
        "qk_norm": kind in ("qwen3", "olmo2"),
        "qk_norm_span": "all" if kind == "olmo2" else "head",
        "attention_biases": biases,
        "norm_placement": "after" if kind == "olmo2" else "before",
        "no_rope_layers": tuple(place for place, layer in enumerate(taken) if layer in unrotated),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(value_of(source, "tie_word_embeddings")),
        "norm_eps": source["rms_norm_eps"],
    }


def _unrotated(source: Mapping[str, Any]) -> set[int]:
    if source["model_type"] != "smollm3":
        return set()
    n_layers = int(source["num_hidden_layers"])
    interval = source.get("no_rope_layer_interval") or 4
    rotated = source.get("no_rope_layers") or [(layer + 1) % interval for layer in range(n_layers)]
    return {layer for layer, rotates in enumerate(rotated) if not rotates}


def _window(source: Mapping[str, Any], taken: Sequence[int]) -> int | None:
    """Tokens that a taken layer sees, where they are limited."""
    kind, window = source["model_type"], value_of(source, "sliding_window")
    if kind in ("qwen2", "qwen3", "smollm3"):
        types = source.get("layer_types")
        if types is not None:
            slides = any(types[layer] == "sliding_attention" for layer in taken if layer < len(types))
        elif kind == "smollm3":
            slides = bool(set(taken) & _unrotated(source))
        else:
            slides = any(layer >= source.get("max_window_layers", 28) for layer in taken)
        if not source.get("use_sliding_window") or not slides:
            return None
    return None if window is None else int(window)


def _rope(source: Mapping[str, Any]) -> tuple[tuple[float, RopeScaling | None], list[str]]:
    """Base and scaling of RoPE, and what is wrong with them: in one dictionary since transformers 5, in two keys
    before."""
    key, kind, given, theta = _rope_keys(source)
    if (lost := _lost_base(source)) is not None:
        return (theta, None), [lost]
    if any(isinstance(value, dict) for value in given.values()):
        return (theta, None), [f"{key}: given by layer type; allowed: one for all layers"]
    if (share := given.get("partial_rotary_factor")) not in (None, 1.0):
        return (theta, None), [f"{key}.partial_rotary_factor: given {share}; allowed: 1.0"]
    if kind == "default":
        return (theta, None), []
    if kind not in _SCALED:
        allowed = ", ".join(("default", *_SCALED))
        return (theta, None), [
            f"rope_type: given {kind!r}; allowed: {allowed} (frequencies do not follow the text here)"
        ]
    return _scaled(source, kind, {name: value for name, value in given.items() if name in _keys_of(kind)}, theta)


def _lost_base(source: Mapping[str, Any]) -> str | None:
    """What is wrong with a rope_scaling that was added beside rope_parameters: transformers then takes nothing of the
    latter, so that the base in it would be another than is meant."""
    old, new = source.get("rope_scaling") or {}, source.get("rope_parameters") or {}
    if not old or "rope_theta" in old or new.get("rope_theta") in (None, source.get("rope_theta")):
        return None
    return (
        f"rope_scaling: given beside rope_parameters, whose rope_theta {new['rope_theta']} transformers then ignores; "
        "allowed: one of them, with rope_theta in it"
    )


def _rope_keys(source: Mapping[str, Any]) -> tuple[str, str, dict[str, Any], float]:
    """The dictionary's name, the kind of scaling, the other keys in it, and the base."""
    old, new = source.get("rope_scaling") or {}, source.get("rope_parameters") or {}
    given = dict(old or new)
    default = _ABSENT[source["model_type"]].get("rope_theta", 10000.0)
    theta = given.pop("rope_theta", None) or source.get("rope_theta") or default
    kinds = [given.pop(name, None) for name in ("rope_type", "type")]
    return "rope_scaling" if old else "rope_parameters", kinds[0] or kinds[1] or "default", given, float(theta)


def _keys_of(kind: str) -> tuple[str, ...]:
    """What transformers reads of a kind of scaling."""
    needed, optional = SCALING_KEYS.get(kind, ((), ()))
    return ("partial_rotary_factor", *(("factor",) if kind != "default" else ()), *needed, *optional)


def _scaled(
    source: Mapping[str, Any], kind: str, given: dict[str, Any], theta: float
) -> tuple[tuple[float, RopeScaling | None], list[str]]:
    longest = value_of(source, "max_position_embeddings")
    given.pop("partial_rotary_factor", None)
    if kind != "linear":
        original = source.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = original or longest
    if kind == "yarn":
        if given.get("factor") is None:
            given["factor"] = longest / given["original_max_position_embeddings"]
        # As transformers reads them: both or none, and not beside attention_factor.
        both = given.get("mscale") and given.get("mscale_all_dim")
        if not both or given.get("attention_factor") is not None:
            given = {key: value for key, value in given.items() if not key.startswith("mscale")}
        given = {key: value for key, value in given.items() if value or not key.startswith("beta_")}
        if "truncate" in given:
            given["truncate"] = bool(given["truncate"])  # null is false there
    try:
        given = {key: value for key, value in given.items() if value is not None}
        scaling = RopeScaling.model_validate({"rope_type": kind, **given})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return (theta, None), [f"rope_scaling.{place}: {first['msg']}, given {first['input']!r}"]
    wrong = scaling_problem(scaling)
    return (theta, scaling), [f"rope_scaling: {wrong}"] if wrong else []


def hf_weights(folder: Path, *, allow_pickle: bool = False) -> TensorSource:
    """The tensors of a Hugging Face folder under the names that transformers gives them, whatever wrote them. Raises
    CheckpointError as `open_weights` does."""
    return without_prefix(open_weights(folder, allow_pickle=allow_pickle), "model.embed_tokens.weight")
