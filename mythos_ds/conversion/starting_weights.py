"""Weights of every kind as the start of a training run: which model they are, and its tensors."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.built_in import BUILT_IN
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import ModelConfig, TrainingConfig
from mythos_ds.config.starting_model import model_section
from mythos_ds.conversion.dense_source import FAMILIES, hf_weights, unread_fields, unread_note, value_of
from mythos_ds.conversion.fp8 import Dequantised
from mythos_ds.conversion.hf_names import LEFT_OUT
from mythos_ds.conversion.huggingface import mythos_config, mythos_source, unread_by_mythos
from mythos_ds.conversion.merge import merged_source, model_of, newest_tag
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel
from mythos_ds.conversion.openmythos import read_openmythos
from mythos_ds.conversion.retrofit import Cut, Retrofitted, describe, retrofit_config
from mythos_ds.errors import CheckpointError, Coded, ConfigError
from mythos_ds.io import read_json, where_searched
from mythos_ds.weights.built_in import model_path
from mythos_ds.weights.checksums import require_whole
from mythos_ds.weights.model_folder import CONFIG, read_config
from mythos_ds.weights.pickled import PICKLES
from mythos_ds.weights.reader import StartingWeights, TensorFolder, TensorSource, TensorSpec
from mythos_ds.weights.writer import CHECKSUMS, checksum

_VOCABULARY = ("embed.weight", "lm_head.weight")
_LOOP_TABLES = ("router.loop_bias", "router.loop_updates")
_ROWS = 4096
_THREADS = 4
_CUT = ("prelude_layers", "recurrent_layers", "coda_layers")
_SETTINGS = {
    "--prelude": "model.prelude_layers",
    "--recurrent": "model.recurrent_layers",
    "--coda": "model.coda_layers",
    "--experts": "model.n_experts",
    "--experts-per-token": "model.n_experts_per_tok",
    "--granularity": "intermediate_size / model.expert_dim",
    "--mean-recurrence": "model.mean_recurrence",
    "--max-loops": "model.max_loops",
    "--context-length": "training.seq_len",
}
"""What says in a run's file what an option of `convert` says of a cut."""
_OPTION = re.compile("|".join(rf"{option}(?![\w-])" for option in _SETTINGS))
_ENDINGS = (".safetensors", *PICKLES)


def foreign_section(
    path: Path, given: Mapping[str, Any], *, context: int | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """`config.starting_model.model_section` of weights that are not in a format of ours: a Hugging Face folder, or
    OpenMythos weights. Raises ConfigError for anything else."""
    place = model_path(path)
    if place != path:
        return model_section(place, given, context=context, allow_pickle=allow_pickle)
    if manifest.list_tags(_checkpoints(place)) and not (place / CONFIG).exists():  # apart from their run's manifest
        return _dumped(model_of(read_state(newest_tag(place))))
    kind = _foreign_kind(place)
    try:
        if kind == "openmythos":
            return _dumped(read_openmythos(place, allow_pickle=allow_pickle)[1])
        hf = read_json(place / CONFIG)
        return _dumped(mythos_config(hf) if kind == "mythos" else retrofit_config(hf, _cut_of(hf, given, context)))
    except ConfigError as error:
        renamed = [
            Coded(problem.code, _OPTION.sub(lambda found: _SETTINGS[found[0]], problem)) for problem in error.problems
        ]
        raise ConfigError(renamed) from None
    except CheckpointError as error:
        raise ConfigError(error.problems) from None


def open_starting_weights(resolved: ResolvedRun, rank: int, *, allow_pickle: bool = False) -> StartingWeights:
    """The tensors that `training.init_from` names, as those of the run's model. Rank 0 verifies their checksums, where
    there are any, and takes their digest. Raises CheckpointError for what is damaged or does not fit."""
    path = model_path(Path(str(resolved.config.training.init_from)))
    config, training = resolved.config.model, resolved.config.training
    try:
        kind, source, notes = _fitted(path, config, training, allow_pickle)
    except ConfigError as error:
        raise ConfigError([problem.after("training.init_from: ") for problem in error.problems]) from None
    except CheckpointError as error:
        before = "" if str(path) in str(error) else f"{path}: "
        raise CheckpointError([problem.after(before) for problem in error.problems]) from None
    identity = {"name": path.resolve().name, "kind": kind, "sha256": _digest(path) if rank == 0 else None}
    return StartingWeights(source, identity, tuple(notes))


def _fitted(
    path: Path, config: ModelConfig, training: TrainingConfig, allow_pickle: bool
) -> tuple[str, TensorSource, list[str]]:
    """Kind of the weights, the tensors of the run's model, and what there is to say."""
    kind, source, own, notes = _opened(path, config, training, allow_pickle)
    if own.halting == "gate" and config.halting != "gate":
        source = _Without(source, LEFT_OUT)
        notes.append("the trained exit gate is left out")
    if config.max_loops != own.max_loops:
        source = _OtherLoops(source, config.max_loops)
        notes.append(f"the routers' biases of loops are those of {config.max_loops} loops, of {own.max_loops} trained")
    if config.vocab_size > own.vocab_size:
        source = ExtendedVocabulary(source, config.vocab_size)
        notes.append(
            f"{config.vocab_size - own.vocab_size} rows added to the vocabulary of {own.vocab_size}, each the mean of "
            "the others"
        )
    return kind, WholeModel(source, config, None, ROUTER_BUFFERS), notes


def _opened(
    path: Path, config: ModelConfig, training: TrainingConfig, allow_pickle: bool
) -> tuple[str, TensorSource, ModelConfig, list[str]]:
    """Kind of the weights, their tensors, their own configuration, and what there is to say."""
    if _is_model_folder(path):
        return "model", TensorFolder(path), read_config(path), []
    if path.is_dir() and not (path / CONFIG).exists() and not _is_pickle(path):
        tag = newest_tag(path)
        own = model_of(read_state(tag))
        return "checkpoint", merged_source(tag, own, "float32"), own, [f"weights of {tag.name}"]
    kind = _foreign_kind(path)
    if kind == "openmythos":
        source, own, metadata = read_openmythos(path, allow_pickle=allow_pickle)
        return kind, WholeModel(source, own, None, ROUTER_BUFFERS), own, unread_note(metadata.get("unread", []))
    hf = read_json(path / CONFIG)
    weights = hf_weights(path, allow_pickle=allow_pickle)
    if kind == "mythos":
        source, own = mythos_source(Dequantised(weights) if "quantization_config" in hf else weights, hf)
        return "hf", source, own, unread_note(unread_by_mythos(hf))
    cut = _cut_of(hf, config.model_dump(), training.seq_len, training.seed)
    notes = [*describe(cut, int(hf["num_hidden_layers"])), *unread_note(unread_fields(hf))]
    return kind, Retrofitted(weights, hf, cut), retrofit_config(hf, cut), notes


def _checkpoints(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _is_model_folder(path: Path) -> bool:
    content = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def _is_pickle(path: Path) -> bool:
    """Whether a folder is one file of torch.save, which holds its configuration, and nothing that a run leaves."""
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, "manifest.json", manifest.STATE)):
        return False
    return sum(file.suffix in PICKLES for file in path.iterdir()) == 1


def _foreign_kind(path: Path) -> str:
    """ "openmythos", or the model_type of a Hugging Face folder. Raises ConfigError for what is neither."""
    if _is_pickle(path) or (path.is_file() and path.suffix in _ENDINGS):
        return "openmythos"
    if path.is_file():
        raise ConfigError(
            f"given {path}, a file; allowed: a folder, or a file that ends in {', '.join(_ENDINGS)}", code="MDS141"
        )
    if not path.is_dir():
        raise ConfigError(
            f"given {path}; no such file or folder{where_searched(path)}; allowed: a model, a run, a checkpoint "
            f'or "{BUILT_IN}"',
            code="MDS141",
        )
    content = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    if not isinstance(content, dict):
        raise ConfigError(
            f"given {path}, which has no {CONFIG}, no checkpoint and no run's manifest.json", code="MDS141"
        )
    kind = content.get("model_type")
    if kind is None and "max_loop_iters" in content:
        return "openmythos"
    if kind == "mythos" or kind in FAMILIES:
        return str(kind)
    raise ConfigError(
        f"given {path}, whose {CONFIG} says model_type {kind!r}; allowed: a mythos model, OpenMythos weights, "
        f"{', '.join(FAMILIES)}",
        code="MDS141",
    )


def _cut_of(hf: Mapping[str, Any], given: Mapping[str, Any], context: int | None = None, seed: int = 0) -> Cut:
    """How a dense model is cut into what the run's model section asks for."""
    if missing := [name for name in _CUT if not isinstance(given.get(name), int)]:
        raise ConfigError(
            f"given a dense model ({hf.get('model_type')}, {hf.get('num_hidden_layers')} layers), which has to be cut; "
            f"needed: model.{missing[0]} (or a whole file, written by mythos-ds loop-from-dense)"
        )
    hidden, width = hf.get("intermediate_size"), given.get("expert_dim")
    values: dict[str, Any] = {name.removesuffix("_layers"): given[name] for name in _CUT}
    if isinstance(hidden, int) and isinstance(width, int) and width > 0:
        values["granularity"] = max(hidden // width, 1)
    names = {"n_experts": "n_experts", "n_experts_per_tok": "experts_per_token"}
    names |= {name: name for name in ("mean_recurrence", "max_loops")}
    values |= {own: given[name] for name, own in names.items() if isinstance(given.get(name), int)}
    longest = value_of(hf, "max_position_embeddings")
    if context is not None and type(longest) is int:
        values["context_length"] = min(context, longest)  # a window matters where sequences are longer
    return Cut(**values, seed=seed)


def _dumped(config: ModelConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _digest(path: Path) -> str:
    """SHA-256 that stands for all of the weights: of the checksums, where the folder has them, else of the files."""
    if path.is_dir() and not (path / CONFIG).is_file() and not _is_pickle(path):
        return checksum(newest_tag(path) / manifest.MANIFEST).sha256
    if (path / CHECKSUMS).is_file():
        require_whole(path)
        return checksum(path / CHECKSUMS).sha256
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name == CONFIG or file.suffix in _ENDINGS)
    with ThreadPoolExecutor(_THREADS) as threads:
        records = list(threads.map(checksum, files))
    lines = [f"{file.name} {record.sha256}\n" for file, record in zip(files, records, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Without:
    """A source without the tensors whose names begin so."""

    def __init__(self, source: TensorSource, prefixes: tuple[str, ...]):
        self.source, self.prefixes = source, prefixes

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that stay."""
        return {name: spec for name, spec in self.source.specs().items() if not name.startswith(self.prefixes)}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        return self.source.read(name, rows)


class _OtherLoops:
    """A model's tensors with another largest loop count: routers lose the biases of loops beyond it, or start new ones
    at zero."""

    def __init__(self, source: TensorSource, max_loops: int):
        self.source, self.max_loops = source, max_loops

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor."""
        return {
            name: TensorSpec(spec.dtype, (self.max_loops, *spec.shape[1:])) if name.endswith(_LOOP_TABLES) else spec
            for name, spec in self.source.specs().items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        if not name.endswith(_LOOP_TABLES):
            return self.source.read(name, rows)
        given = self.source.read(name)[: self.max_loops]
        whole = torch.cat([given, given.new_zeros(self.max_loops - given.shape[0], *given.shape[1:])])
        return whole if rows is None else whole[rows]


class ExtendedVocabulary:
    """A model's tensors with a larger vocabulary: each added row of embedding and head is the mean of the others."""

    def __init__(self, source: TensorSource, vocab_size: int):
        self.source, self.vocab_size = source, vocab_size
        self._means: dict[str, Tensor] = {}

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor."""
        return {
            name: TensorSpec(spec.dtype, (self.vocab_size, *spec.shape[1:])) if name in _VOCABULARY else spec
            for name, spec in self.source.specs().items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        if name not in _VOCABULARY:
            return self.source.read(name, rows)
        spec = self.source.specs()[name]
        first, last = (rows.start, rows.stop) if rows is not None else (0, self.vocab_size)
        own = min(max(first, 0), spec.shape[0]), min(last, spec.shape[0])
        given = self.source.read(name, slice(*own)) if own[0] < own[1] else torch.empty(0, *spec.shape[1:])
        added = self._mean(name, spec).expand(last - max(first, own[1]), -1) if last > own[1] else given[:0]
        return torch.cat([given.to(spec.dtype), added.to(spec.dtype)])

    def _mean(self, name: str, spec: TensorSpec) -> Tensor:
        if name not in self._means:
            total = torch.zeros(spec.shape[1], dtype=torch.float64)
            for start in range(0, spec.shape[0], _ROWS):
                rows = slice(start, min(start + _ROWS, spec.shape[0]))
                total += self.source.read(name, rows).double().sum(0)
            self._means[name] = (total / spec.shape[0]).float()
        return self._means[name]
