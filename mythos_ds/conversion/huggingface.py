"""Hugging Face folders: from a mythos folder and back, tensor by tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.hf_names import LEFT_OUT, Names
from mythos_ds.conversion.model_target import WholeModel, folder_dtype, write_config
from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json, write_atomic
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.model_folder import CONFIG, TOKENIZER, read_config, read_metadata
from mythos_ds.weights.reader import TensorFolder, TensorSource, TensorSpec
from mythos_ds.weights.writer import MAX_FILE_BYTES, write_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "ffn_dim": "intermediate_size",
    "prelude_layers": "num_prelude_layers", "recurrent_layers": "num_recurrent_layers",
    "coda_layers": "num_coda_layers", "max_loops": "max_loops", "mean_recurrence": "mean_recurrence",
    "attn_type": "attention_type", "n_heads": "num_attention_heads", "qk_norm": "qk_norm",
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
_NEVER = -1e6
"""Log-probability of pieces that no text gives, such as </s>."""
_CARD = "README.md"
_SAMPLE = "def f(x):\n\t  return  x ** 2  # naïve “quotes” 漢字 🙂 \u2581 1234567\n\n"


class _HfTensors:
    """A mythos folder under Hugging Face names, experts one by one."""

    def __init__(self, source: TensorSource, config: ModelConfig, dtype: torch.dtype):
        self.source, names = source, Names(config.attn_type == "mla")
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

    def __init__(self, source: TensorSource, latent: bool):
        self.source, names = source, Names(latent)
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
                raise CheckpointError(f"{ours}: expert {missing[0]} is not in the given weights")
            shapes = {given[name].shape for name in parts.values()}
            if len(shapes) > 1:
                raise CheckpointError(f"{ours}: experts of different shapes, {sorted(shapes)}")
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
    return _HfTensors(TensorFolder(model_folder), _model_config(model_folder), DTYPES[dtype])


def hf_config(model_folder: Path, dtype: str) -> dict[str, Any]:
    """config.json of the Hugging Face folder."""
    config = _model_config(model_folder)
    content = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    metadata = read_metadata(model_folder)
    grouped = config.attn_type == "gqa"
    content |= {
        "model_type": "mythos",
        "architectures": ["MythosForCausalLM"],
        "n_loops": config.mean_recurrence,
        "num_key_value_heads": config.resolved_kv_heads if grouped else config.n_heads,
        "head_dim": config.resolved_head_dim if grouped else None,
        "shared_expert_intermediate_size": config.resolved_shared_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": metadata.get("seq_len", 4096),
        "dtype": dtype,
        # Beyond what a forward needs: what training goes on with.
        "mythos": {"init_std": config.init_std, "embedding_std": config.embedding_std, "facts": metadata},
    }
    return {name: value for name, value in sorted(content.items()) if value is not None}


def hf_notes(model_folder: Path) -> list[str]:
    """What is lost on the way, for people to read."""
    if _model_config(model_folder).halting == "gate":
        return ["the trained gate is left out: every token runs n_loops loops"]
    return []


def hf_metadata(hf: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the mythos folder from which a Hugging Face folder with this config.json was made."""
    return dict((hf.get("mythos") or {}).get("facts") or {})


def _model_config(folder: Path) -> ModelConfig:
    config = read_config(folder)
    if config.halting not in ("none", "gate"):
        raise CheckpointError(f"{folder}: model.halting: given {config.halting}; transformers runs none and gate only")
    return config


def mythos_source(source: TensorSource, hf: dict[str, Any]) -> tuple[TensorSource, ModelConfig]:
    """Hugging Face tensors and their config.json as ours. Raises CheckpointError where something is missing."""
    if hf.get("model_type") != "mythos":
        raise CheckpointError(f"config.json: model_type {hf.get('model_type')!r}, expected 'mythos'")
    values = {ours: hf[theirs] for ours, theirs in FIELDS.items() if hf.get(theirs) is not None}
    values["rope_theta"] = (hf.get("rope_parameters") or {}).get("rope_theta")
    if hf.get("attention_type") == "gqa":
        values |= {"n_kv_heads": hf.get("num_key_value_heads"), "head_dim": hf.get("head_dim")}
    values["shared_expert_dim"] = hf.get("shared_expert_intermediate_size")
    own = hf.get("mythos") or {}
    values |= {name: own[name] for name in ("init_std", "embedding_std") if own.get(name) is not None}
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"config.json: not a configuration of this model ({error})") from None
    renamed = _MythosTensors(source, config.attn_type == "mla")
    return WholeModel(renamed, config, None), config


def write_side_files(model_folder: Path, output: Path, config: dict[str, Any], *, with_remote_code: bool) -> None:
    """Everything beside the weights; config.json last, since a folder without it is not a model."""
    metadata = read_metadata(model_folder)
    end: dict[str, Any] = {}
    if (model_folder / TOKENIZER).is_file():
        end = write_tokenizer(model_folder / TOKENIZER, output)
    config = {**config, **end}
    write_atomic(output / "generation_config.json", json.dumps({**end, "use_cache": True}, indent=2) + "\n")
    write_atomic(output / _CARD, model_card(config, metadata))
    if with_remote_code:
        import mythos_hf

        package = Path(mythos_hf.__file__).parent
        for name in ("configuration_mythos", "modeling_mythos"):
            copyfile(package / f"{name}.py", output / f"{name}.py")
        config["auto_map"] = {
            "AutoConfig": "configuration_mythos.MythosConfig",
            "AutoModel": "modeling_mythos.MythosModel",
            "AutoModelForCausalLM": "modeling_mythos.MythosForCausalLM",
        }
    seal(output, config)


def write_tokenizer(model: Path, output: Path) -> dict[str, int]:
    """tokenizer.json with the ids of the sentencepiece model, which is kept beside it; returns the special ids.

    Raises CheckpointError where a sample is not encoded alike.
    """
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = pieces.GetPieceSize()
    vocabulary = {pieces.IdToPiece(i): i for i in range(size)}
    scores = {pieces.IdToPiece(i): pieces.GetScore(i) for i in range(size)}
    plain = [p for p, i in vocabulary.items() if not (pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i))]
    unknown = pieces.IdToPiece(pieces.unk_id())
    core: models.Model
    if any(score != int(score) for score in scores.values()):  # log-probabilities; those of BPE are minus a rank
        known = set(plain)
        ordered = [(p, scores[p] if p in known else _NEVER) for p in vocabulary]
        core = models.Unigram(ordered, pieces.unk_id(), byte_fallback=True)
    else:
        core = models.BPE(vocabulary, _merges(plain, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(core)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    if made.encode(_SAMPLE, add_special_tokens=False).ids != pieces.EncodeAsIds(_SAMPLE):
        raise CheckpointError(f"{model}: no tokenizer.json with the same ids could be made")
    special = {"unk_token": unknown, "eos_token": pieces.IdToPiece(pieces.eos_id())}
    ids = {"eos_token_id": pieces.eos_id()}
    for name in ("bos", "pad"):
        number = getattr(pieces, f"{name}_id")()
        if number >= 0:
            special[f"{name}_token"], ids[f"{name}_token_id"] = pieces.IdToPiece(number), number
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        split_special_tokens=True,  # "</s>" in a text is text, as in training
        **special,
    )
    fast.save_pretrained(str(output))
    copyfile(model, output / TOKENIZER)
    return ids


def _merges(pieces: list[str], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that make each piece of two others, in the order in which sentencepiece prefers them."""
    found = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in scores and b in scores]
        known.sort(key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
        found += [(-scores[piece], pair) for pair in known]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def model_card(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """README.md of the folder."""
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in metadata.items() if name != "training")
    depth = config["mean_recurrence"]
    return f"""---
library_name: transformers
tags: [mythos, recurrent-depth, mixture-of-experts]
---
# A recurrent-depth mixture-of-experts model

{config["num_prelude_layers"]} + {config["num_recurrent_layers"]} x T + {config["num_coda_layers"]} layers of width
{config["hidden_size"]}, {config["n_routed_experts"]} experts, {config["num_experts_per_tok"]} per token;
T = {depth} unless `n_loops` says otherwise (trained with up to {config["max_loops"]}).

```python
import mythos_hf  # from the mythos_ds repository; makes the Auto classes know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, n_loops={2 * depth})[0]))
```

| fact | value |
|---|---|
{rows}
"""


def export(
    model_folder: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    jobs: int = 1,
    with_remote_code: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a mythos folder as a Hugging Face folder. Raises CheckpointError for a model that transformers cannot
    run."""
    config = hf_config(model_folder, dtype)
    source = hf_source(model_folder, dtype)
    write_tensors(source, output, jobs=jobs, max_file_bytes=max_file_bytes, progress=progress)
    write_side_files(model_folder, output, config, with_remote_code=with_remote_code)


def import_hf(folder: Path, output: Path, *, jobs: int = 1, progress: Callable[[int], None] | None = None) -> None:
    """Write a Hugging Face folder of this model as a mythos folder. Raises CheckpointError for another model."""
    hf = read_json(folder / CONFIG)
    source, config = mythos_source(TensorFolder(folder), hf)
    write_tensors(source, output, jobs=jobs, progress=progress)
    write_config(output, config, hf_metadata(hf), folder / TOKENIZER)
