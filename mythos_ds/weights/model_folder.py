"""A model in one folder: config.json and safetensors, whole, in fp32 or bf16. What tools and studies read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mythos_ds.config.rules.check import check_model
from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import CheckpointError, OutputError, naming
from mythos_ds.io import open_new, read_json, sync, temporary_path, write_atomic, writing_to
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.reader import SINGLE, TensorFolder, TensorSource
from mythos_ds.weights.whole_model import check_whole

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
_FORMAT = 1


def save_model(model: MythosModel, folder: str | Path, metadata: dict[str, Any]) -> None:
    """Writes a whole model (all parts, not partitioned) to `folder`; `metadata` is JSON values kept beside its
    configuration, under "facts". The configuration is written last: a folder without it is not a model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    _save(tensors, folder / SINGLE)
    content = {"format": _FORMAT, "model": model.config.model_dump(mode="json"), "facts": metadata}
    write_atomic(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = temporary_path(path.parent)
    try:
        with writing_to(path):
            with open_new(temporary):
                save_file(tensors, temporary)
            sync(temporary)
            temporary.replace(path)
    except SafetensorError as error:  # the disk's errors, by its own name
        raise OutputError(f"{path}: not written ({error})", code="MDS602") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `save_model` kept beside the weights. Raises CheckpointError where `folder` is not a model."""
    return _read(folder)["facts"]


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration. Raises CheckpointError where `folder` is not a model."""
    return checked_config(_read(folder)["model"], f"{folder / CONFIG}: model")


def checked_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """The configuration of these fields; `where` names them in messages. Raises CheckpointError for one that there
    cannot be, and for a model that cannot be built of it."""
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join((where, *map(str, first["loc"])))
        raise CheckpointError(f"{place}: {first['msg']}, given {first['input']!r}", code="MDS518") from None
    for key, message in check_model(config):
        raise CheckpointError(f"{where}.{key}: {message}", code="MDS518")
    return config


def load_model(folder: str | Path, adapt: Callable[[MythosModel], None] | None = None) -> MythosModel:
    """The model in evaluation mode, on the CPU; `adapt` makes it the variant that was saved. Raises CheckpointError
    where a file is missing, damaged or does not fit the configuration."""
    folder = Path(folder)
    config, source = read_config(folder), TensorFolder(folder)
    if adapt is None:  # before memory is taken for what the configuration says
        with naming(folder):
            check_whole(source.specs(), config)
    model = MythosModel(config)
    if adapt is not None:
        adapt(model)
    try:
        return _filled(model, source)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / SINGLE}: {error}") from None


def model_of(source: TensorSource, config: ModelConfig) -> MythosModel:
    """The model in evaluation mode, on the CPU, of all tensors of such a model (the tied head excepted)."""
    return _filled(MythosModel(config), source)


def _filled(model: MythosModel, source: TensorSource) -> MythosModel:
    tensors = {name: source.read(name) for name in source.specs()}
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    content = read_json(path)
    parts = (content.get("model"), content.get("facts")) if isinstance(content, dict) else ()
    if not parts or content.get("format") != _FORMAT or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: not a model folder of format {_FORMAT}", code="MDS518")
    return content
