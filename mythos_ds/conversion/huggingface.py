"""Hugging Face folders: from a mythos folder and back, tensor by tensor."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mythos_ds.config.rules.model import rope_scaling
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.dense_source import NO_COMPUTATION
from mythos_ds.conversion.hf_card import model_card
from mythos_ds.conversion.hf_names import LEFT_OUT, Names
from mythos_ds.conversion.hf_tokenizer import write_generation_config, write_tokenizer
from mythos_ds.conversion.model_target import WholeModel, folder_dtype
from mythos_ds.data.tokenizer_files import copy_tokenizer, has_tokenizer
from mythos_ds.errors import CheckpointError, TensorMismatchError
from mythos_ds.io import copy_file, write_atomic
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.model_folder import read_config, read_metadata
from mythos_ds.weights.reader import TensorFolder, TensorSource, TensorSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "ffn_dim": "intermediate_size",
    "prelude_layers": "num_prelude_layers", "recurrent_layers": "num_recurrent_layers",
    "coda_layers": "num_coda_layers", "max_loops": "max_loops", "mean_recurrence": "mean_recurrence",
    "attn_type": "attention_type", "n_heads": "num_attention_heads", "qk_norm": "qk_norm",
    "qk_norm_span": "qk_norm_span", "attention_biases": "attention_biases", "norm_placement": "norm_placement",
    "no_rope_layers": "no_rope_layers",
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "rope_interleaved": "rope_interleaved",
    "n_experts": "n_routed_experts", "n_experts_per_tok": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size", "n_shared_experts": "n_shared_experts", "router_score": "scoring_func",
    "route_scale": "routed_scaling_factor", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "injection": "injection", "discretisation": "discretisation", "state_dtype": "state_dtype",
    "initial_state": "initial_state", "prelude_norm": "prelude_norm", "loop_embedding": "loop_embedding",
    "lora_rank": "lora_rank", "lora_target": "lora_target", "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
"""Our fields and those of the Hugging Face configuration that say the same."""
_CARD = "README.md"
_ALSO_READ = {
    "model_type", "n_loops", "num_key_value_heads", "head_dim", "shared_expert_intermediate_size", "rope_parameters",
    "max_position_embeddings", "mythos", "quantization_config", "hidden_act", "num_hidden_layers",
}  # fmt: skip


class _HfTensors:
    """A mythos folder under Hugging Face names, experts one by one."""

    def __init__(self, source: TensorSource, config: ModelConfig, dtype: torch.dtype):
        self.source, names = source, Names(config.attn_type == "mla", config.norm_placement)
        self.places: dict[str, tuple[str, int | None, TensorSpec]] = {}
        for ours, spec in source.specs().items():
            if ours.startswith(LEFT_OUT):
                continue
            theirs, kind = names.to_hf(ours), folder_dtype(ours, spec, dtype)
            if "*" not in theirs:
                self.places[theirs] = ours, None, TensorSpec(kind, spec.shape)
                continue
            for expert in range(spec.shape[0]):
                place = ours, expert, TensorSpec(kind, spec.shape[1:])
                self.places[theirs.replace("*", str(expert))] = place

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the Hugging Face model."""
        return {name: spec for name, (_, _, spec) in self.places.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        ours, expert, spec = self.places[name]
        if expert is None:
            return self.source.read(ours, rows).to(spec.dtype)
        whole = self.source.read(ours, slice(expert, expert + 1))[0]
        return (whole if rows is None else whole[rows]).to(spec.dtype)


class _MythosTensors:
    """Hugging Face tensors under our names, experts stacked."""

    def __init__(self, source: TensorSource, config: ModelConfig):
        self.source, names = source, Names(config.attn_type == "mla", config.norm_placement)
        self.parts: dict[str, dict[int | None, str]] = {}
        for theirs in source.specs():
            ours, expert = names.from_hf(theirs)
            self.parts.setdefault(ours, {})[expert] = theirs

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, in our names. Raises CheckpointError where experts are missing."""
        given, specs = self.source.specs(), {}
        for ours, parts in self.parts.items():
            if None in parts:
                specs[ours] = given[parts[None]]
                continue
            missing = [expert for expert in range(len(parts)) if expert not in parts]
            if missing:
                raise TensorMismatchError(f"{ours}: expert {missing[0]} is not in the given weights")
            shapes = {given[name].shape for name in parts.values()}
            if len(shapes) > 1:
                raise TensorMismatchError(f"{ours}: experts of different shapes, {sorted(shapes)}")
            kinds = {given[name].dtype for name in parts.values()}
            if len(kinds) > 1:
                raise TensorMismatchError(f"{ours}: experts of different types, {sorted(map(str, kinds))}")
            first = given[parts[0]]
            specs[ours] = TensorSpec(first.dtype, (len(parts), *first.shape))
        return specs

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows; of a stack, whole experts."""
        parts = self.parts[name]
        if None in parts:
            return self.source.read(parts[None], rows)
        chosen = range(len(parts))[rows or slice(None)]
        return torch.stack([self.source.read(parts[expert]) for expert in chosen])


def hf_source(model_folder: Path, dtype: str) -> TensorSource:
    """The folder's tensors as a Hugging Face model's; what computes in fp32 stays fp32. Raises CheckpointError for a
    model that transformers cannot run."""
    config = _model_config(model_folder)
    return _HfTensors(WholeModel(TensorFolder(model_folder), config, None), config, DTYPES[dtype])


def hf_config(model_folder: Path, dtype: str) -> dict[str, Any]:
    """config.json of the Hugging Face folder."""
    config = _model_config(model_folder)
    values = config.model_dump(mode="json")
    content = {theirs: values[ours] for ours, theirs in FIELDS.items()}
    metadata = read_metadata(model_folder)
    grouped = config.attn_type == "gqa"
    content |= {
        "model_type": "mythos",
        "architectures": ["MythosForCausalLM"],
        "n_loops": config.mean_recurrence,
        "num_key_value_heads": config.resolved_kv_heads if grouped else config.n_heads,
        "head_dim": config.resolved_head_dim if grouped else None,
        "shared_expert_intermediate_size": config.resolved_shared_dim,
        "rope_parameters": {"rope_type": "default", **_scaling(config), "rope_theta": config.rope_theta},
        "max_position_embeddings": metadata.get("seq_len", metadata.get("context_length", 4096)),
        "dtype": dtype,
        # Beyond what a forward needs: what training goes on with.
        "mythos": {"init_std": config.init_std, "embedding_std": config.embedding_std, "facts": metadata},
    }
    return {name: value for name, value in sorted(content.items()) if value is not None}


def _scaling(config: ModelConfig) -> dict[str, Any]:
    return {} if config.rope_scaling is None else config.rope_scaling.model_dump(exclude_none=True)


def hf_notes(model_folder: Path) -> list[str]:
    """What is lost on the way, for people to read."""
    if _model_config(model_folder).halting == "gate":
        return ["the trained gate is left out: every token runs n_loops loops"]
    return []


def unread_by_mythos(hf: dict[str, Any]) -> list[str]:
    """The keys of a mythos model's config.json that nothing here knows."""
    known = {*FIELDS.values(), *_ALSO_READ, *NO_COMPUTATION}
    return sorted(key for key in hf if key not in known and not key.startswith("_"))


def hf_metadata(hf: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the mythos folder from which a Hugging Face folder with this config.json was made."""
    facts = _object(hf, "mythos").get("facts")
    return dict(facts) if isinstance(facts, dict) else {}


def _object(hf: dict[str, Any], key: str) -> dict[str, Any]:
    """A JSON object in config.json, empty where it is left out. Raises CheckpointError for another value."""
    value = hf.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key}: given {value!r}; allowed: an object")
    return value


def _model_config(folder: Path) -> ModelConfig:
    config = read_config(folder)
    if config.halting not in ("none", "gate"):
        raise CheckpointError(f"{folder}: model.halting: given {config.halting}; transformers runs none and gate only")
    return config


def mythos_config(hf: dict[str, Any]) -> ModelConfig:
    """The configuration that the config.json of a Hugging Face folder of ours says. Raises CheckpointError for another
    model's."""
    if hf.get("model_type") != "mythos":
        raise CheckpointError(f"config.json: model_type {hf.get('model_type')!r}, expected 'mythos'")
    values = {ours: hf[theirs] for ours, theirs in FIELDS.items() if hf.get(theirs) is not None}
    rope = dict(_object(hf, "rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta", None)
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    if hf.get("attention_type") == "gqa":
        values |= {"n_kv_heads": hf.get("num_key_value_heads"), "head_dim": hf.get("head_dim")}
    values["shared_expert_dim"] = hf.get("shared_expert_intermediate_size")
    own = _object(hf, "mythos")
    values |= {name: own[name] for name in ("init_std", "embedding_std") if own.get(name) is not None}
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"config.json: not a configuration of this model ({faults})") from None
    if (wrong := rope_scaling(config)) is not None:
        raise CheckpointError(f"config.json: rope_parameters: {wrong}")
    return config


def mythos_source(source: TensorSource, hf: dict[str, Any]) -> tuple[TensorSource, ModelConfig]:
    """Hugging Face tensors and their config.json as ours. Raises CheckpointError where something is missing."""
    config = mythos_config(hf)
    renamed = _MythosTensors(source, config)
    return WholeModel(renamed, config, None), config


def write_side_files(model_folder: Path, output: Path, config: dict[str, Any], *, with_remote_code: bool) -> None:
    """Everything beside the weights; config.json last, since a folder without it is not a model."""
    metadata = read_metadata(model_folder)
    copy_tokenizer(model_folder, output)
    end: dict[str, Any] = {}
    if has_tokenizer(model_folder):
        end = write_tokenizer(model_folder, output, with_remote_code=with_remote_code)
    config = {**config, **end}
    write_generation_config(model_folder, output, end)
    write_atomic(output / _CARD, model_card(config, metadata))
    if with_remote_code:
        import mythos_hf

        package = Path(mythos_hf.__file__).parent
        for code in sorted(package.glob("*_mythos.py")):
            copy_file(code, output / code.name)
        config["auto_map"] = {
            "AutoConfig": "configuration_mythos.MythosConfig",
            "AutoModel": "modeling_mythos.MythosModel",
            "AutoModelForCausalLM": "modeling_mythos.MythosForCausalLM",
        }
    seal(output, config)
