"""The weighted mean of models of one lineage: last-k of a run, or siblings trained from one start.

Summed in fp32 and cast once, a piece of a tensor at a time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.conversion.dense_source import FAMILIES
from mythos_ds.conversion.huggingface import mythos_source
from mythos_ds.conversion.model_target import ROUTER_BUFFERS
from mythos_ds.conversion.retrofit import check_dense
from mythos_ds.data.tokenizer_files import is_regular
from mythos_ds.errors import CheckpointError, naming
from mythos_ds.io import copy_file, read_bytes, read_json
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.model_folder import CONFIG, TOKENIZER, read_config
from mythos_ds.weights.reader import TensorSource, TensorSpec
from mythos_ds.weights.whole_model import check_whole

SAME_LINEAGE = 0.2
"""Least cosine between the matrices of two models that may be averaged. Models of different initial values have 0.00,
steps 100 and 1200 of a run 0.60 (docs/convert.md)."""

# Counters and biases that follow the load, and units of measure: a mean of them belongs to no model.
_STATE = (*ROUTER_BUFFERS, "gate.scale", "e_score_correction_bias", "loop_correction_bias", "loop_updates")
_TOKENIZERS = (TOKENIZER, "tokenizer.json", "vocab.json")
_NOT_CONFIGURATION = {"transformers_version", "dtype", "torch_dtype", "_name_or_path"}
_SAMPLE_ROWS = 64
_SAMPLE_BYTES = 1 << 25
_WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", "checksums.json", ".pt", ".bin")


@dataclass(frozen=True)
class SourceModel:
    """A model to be averaged."""

    folder: Path
    config: dict[str, Any]
    tokenizer: str | None
    """SHA-256 of the tokenizer files; None where there are none."""
    metadata: dict[str, Any] | None
    """Of a mythos folder; None for a Hugging Face one."""

    @classmethod
    def open(cls, folder: Path) -> "SourceModel":
        """Reads a mythos or Hugging Face folder. Raises CheckpointError where it is neither."""
        content = read_json(folder / CONFIG)
        if not isinstance(content, dict) or not ({"format", "model"} <= set(content) or "model_type" in content):
            raise CheckpointError(
                f"{folder / CONFIG}: neither a mythos model's nor a Hugging Face configuration", code="MDS517"
            )
        if "quantization_config" in content:
            raise CheckpointError(
                f"{folder}: is quantised; allowed: models in fp32 or bf16 (average, then quantise)", code="MDS516"
            )
        mythos = "model" in content and "format" in content
        config = _settled(folder) if mythos else {k: v for k, v in content.items() if k not in _NOT_CONFIGURATION}
        files = [folder / name for name in _TOKENIZERS if is_regular(folder / name)]
        tokenizer = hashlib.sha256(b"".join(read_bytes(file) for file in files)).hexdigest() if files else None
        return cls(folder, config, tokenizer, content.get("facts", {}) if mythos else None)


def _settled(folder: Path) -> dict[str, Any]:
    """A mythos model's configuration with what null stands for, so that a width that is written out is the same, and
    without what only decides initial values."""
    config = read_config(folder)
    widths = {"n_kv_heads": config.resolved_kv_heads, "head_dim": config.resolved_head_dim}
    own = {} if config.attn_type == "mla" else widths
    values = config.model_dump(mode="json", exclude={"init_std", "embedding_std"})
    return {**values, **own, "shared_expert_dim": config.resolved_shared_dim}


class Mean:
    """sum(weight_i * tensor_i) / sum(weights) of sources with the same tensors; router state and what is not a
    floating-point number come from the last. Raises CheckpointError where keys, shapes or types differ."""

    def __init__(self, sources: Sequence[TensorSource], weights: Sequence[float]):
        self.sources, total = list(sources), sum(weights)
        self.weights = [weight / total for weight in weights]
        self._specs = self.sources[-1].specs()
        for number, source in enumerate(self.sources[:-1], 1):
            _same_specs(source.specs(), self._specs, number)

    @property
    def kept(self) -> list[str]:
        """Tensors that are not averaged but taken from the last source."""
        return [name for name, spec in self._specs.items() if _is_state(name, spec)]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, in the last source's types and order."""
        return dict(self._specs)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A mean or some of its rows."""
        spec = self._specs[name]
        if _is_state(name, spec):
            return self.sources[-1].read(name, rows)
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        total = self.weights[0] * self.sources[0].read(name, rows).to(wide)
        for weight, source in zip(self.weights[1:], self.sources[1:], strict=True):
            total.add_(source.read(name, rows).to(wide), alpha=weight)
        return total.to(spec.dtype)


def check_whole_models(models: Sequence[SourceModel], sources: Sequence[TensorSource]) -> None:
    """Raises CheckpointError where a model's tensors are not those that its configuration demands. Of a Hugging Face
    model that nothing here reads, the models are only compared with each other."""
    for model, source in zip(models, sources, strict=True):
        with naming(model.folder):
            if model.metadata is not None:
                check_whole(source.specs(), read_config(model.folder))
            elif model.config.get("model_type") == "mythos":
                mythos_source(source, model.config)
            elif model.config.get("model_type") in FAMILIES:
                check_dense(source, model.config)


def check_alike(models: Sequence[SourceModel]) -> None:
    """Raises CheckpointError unless all have the first one's configuration and tokenizer."""
    first = models[0]
    for model in models[1:]:
        keys = sorted(set(first.config) | set(model.config))
        odd = [key for key in keys if first.config.get(key) != model.config.get(key)]
        if odd:
            mine, other = (json.dumps(each.config.get(odd[0])) for each in (model, first))
            raise CheckpointError(
                f"{model.folder}: has {odd[0]} {mine}, {first.folder} {other}; allowed: models of one configuration",
                code="MDS517",
            )
        if model.tokenizer != first.tokenizer:
            raise CheckpointError(
                f"{model.folder}: has another tokenizer than {first.folder} ({_short(model.tokenizer)} and "
                f"{_short(first.tokenizer)}); allowed: models of one tokenizer",
                code="MDS517",
            )


def similarity(first: TensorSource, second: TensorSource) -> float:
    """Cosine between the matrices of two models, each less its mean, over up to 64 rows (or experts, at least one and
    else no more than 32 MiB) of each matrix but embedding and head.

    This is how lineage is judged: hidden units and experts of models that started from different initial values stand
    in no relation, so the cosine is near 0 and a mean of them is no model; of models that share a start it is high.
    """
    product = norms = other = 0.0
    for name, spec in second.specs().items():
        if len(spec.shape) < 2 or _is_state(name, spec) or "embed" in name or "lm_head" in name:
            continue
        per_row = max(1, spec.nbytes // max(1, spec.shape[0]))
        rows = slice(0, max(1, min(spec.shape[0], _SAMPLE_ROWS, _SAMPLE_BYTES // per_row)))
        a, b = (source.read(name, rows).double().flatten() for source in (first, second))
        a, b = a - a.mean(), b - b.mean()
        product, norms, other = product + float(a @ b), norms + float(a @ a), other + float(b @ b)
    return product / max((norms * other) ** 0.5, 1e-30)


def lineage_metadata(models: Sequence[SourceModel]) -> dict[str, list[Any]]:
    """What the folders say of where they come from: seed of training and tokens seen; null where they say nothing."""
    metadata = [model.metadata or {} for model in models]
    seeds = [own.get("training", {}).get("seed") for own in metadata]
    return {"seed": seeds, "tokens": [own.get("tokens") for own in metadata]}


def write_averaged_side_files(models: Sequence[SourceModel], weights: Sequence[float], output: Path) -> None:
    """All that the last folder has beside its weights, its configuration last; what was measured on it is left out."""
    last = models[-1].folder
    content = read_json(last / CONFIG)
    for file in sorted(last.iterdir()):
        if file.is_file() and file.name not in (CONFIG, "README.md") and not file.name.endswith(_WEIGHT_ENDINGS):
            copy_file(file, output / file.name)
    averaged = [{"folder": m.folder.name, "weight": w} for m, w in zip(models, weights, strict=True)]
    if models[-1].metadata is not None:
        metadata = {key: value for key, value in models[-1].metadata.items() if key != "losses"}
        content["facts"] = {**metadata, "averaged": averaged}
    elif isinstance(content.get("mythos"), dict):
        metadata = {key: value for key, value in (content["mythos"].get("facts") or {}).items() if key != "losses"}
        content["mythos"] = {**content["mythos"], "facts": {**metadata, "averaged": averaged}}
    seal(output, content)


def _is_state(name: str, spec: TensorSpec) -> bool:
    return name.endswith(_STATE) or not spec.dtype.is_floating_point


def _same_specs(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], number: int) -> None:
    odd = sorted(set(given) ^ set(wanted))
    if odd:
        raise CheckpointError(f"model {number}: {odd[0]} is in it or in the last one, not in both", code="MDS517")
    for name, spec in wanted.items():
        if given[name] != spec:
            found, expected = (f"{each.dtype} {each.shape}" for each in (given[name], spec))
            raise CheckpointError(f"model {number}: {name} is {found}, in the last one {expected}", code="MDS517")


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
