"""The model section of a run that starts from weights: the weights' own configuration, and what may differ from it."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos_ds.config.built_in import BUILT_IN
from mythos_ds.config.rules.check import check_model
from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import Coded, ConfigError, MythosError, Problem
from mythos_ds.io import read_json

FREE = ("mean_recurrence", "embedding_std", "init_std", "act_threshold", "state_dtype")
"""Settings that no tensor of the weights depends on, and that a run may therefore choose anew."""

CONFIG = "config.json"
_RUN_MANIFEST, _CHECKPOINTS = "manifest.json", "checkpoints"
_TRAINING_STATE = "training_state.json"


def complete_model(raw: dict[str, Any], *, allow_pickle: bool = False) -> list[Problem]:
    """Fill in what the model section of `raw` leaves out, from the weights that `training.init_from` names; (key path,
    message) of each setting that contradicts them. Does nothing for a run from random weights, nor where a whole model
    section is given and the weights are not here: on the machine that plans it, or once the run needs them no more."""
    training, given = raw.get("training"), raw.get("model", {})
    source = training.get("init_from") if isinstance(training, dict) else None
    if not isinstance(source, str) or not isinstance(given, dict):
        return []
    try:
        length = training.get("seq_len") if isinstance(training, dict) else None
        context = length if type(length) is int and length > 0 else None
        own = model_section(Path(source), given, context=context, allow_pickle=allow_pickle)
    except MythosError as error:
        needed = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
        if needed <= set(given) and not is_here(source):
            return []
        return [("training.init_from", problem) for problem in error.problems]
    raw["model"] = {**own, **given}
    return [(f"model.{key}", message) for key, message in differences(own, given, source)]


def is_here(source: str) -> bool:
    """Whether there is anything that `training.init_from` names."""
    try:
        there = os.path.lexists(source)
    except ValueError:  # a character that no name can have
        there = False
    return there or Path(source) == Path(BUILT_IN)


def model_section(
    path: Path, given: Mapping[str, Any], *, context: int | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """The configuration, as JSON values, of the model that a run from `path` starts as. Raises MythosError for anything
    that is no model.

    given: what the run's own model section says, from which a dense model is cut; context: the run's sequence length;
    allow_pickle: execute what a file holds that keeps its configuration beside its tensors.
    """
    try:
        found = _own_section(path)
        if found is None:
            # Other formats take torch to read; conversion stands above this package, and this is the one call upward.
            found = importlib.import_module("mythos_ds.conversion.starting_weights").foreign_section(
                path, given, context=context, allow_pickle=allow_pickle
            )
    except OSError as error:  # a name that no file can have, a folder that may not be read
        raise ConfigError(f"given {path}; not readable ({error.strerror})", code="MDS141") from None
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    lists = {name: list(value) for name, value in defaults.items() if isinstance(value, tuple)}
    return {**defaults, **lists, **found}


def _own_section(path: Path) -> dict[str, Any] | None:
    """That of a model folder, a checkpoint or a run of ours; None for anything else."""
    places = (
        (path / CONFIG, ("model",)),
        (path / _TRAINING_STATE, ("config", "model")),
        (path / _RUN_MANIFEST, ("pinned", "model")),
        # a run's folder of checkpoints
        (path.parent / _RUN_MANIFEST if path.name == _CHECKPOINTS else path / _RUN_MANIFEST, ("pinned", "model")),
    )
    for file, keys in places:
        content = _json(file)
        for key in keys:
            content = content.get(key) if isinstance(content, dict) else None
        if isinstance(content, dict):
            _check(content, file, keys)
            return content
    return None


def _check(section: dict[str, Any], file: Path, keys: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the file, where the weights' own configuration is none: it is not the run's fault."""
    try:
        found = check_model(ModelConfig.model_validate(section))
    except ValidationError as error:
        found = [(".".join(map(str, item["loc"])), Coded("MDS141", item["msg"])) for item in error.errors()]
    if found:
        raise ConfigError([message.after(f"{file}: {'.'.join((*keys, key))}: ") for key, message in found])


def _json(file: Path) -> Any:
    return read_json(file, Any, ConfigError) if os.path.lexists(file) and not file.is_dir() else None


def differences(own: Mapping[str, Any], given: Mapping[str, Any], source: str) -> list[Problem]:
    """(key, message) of each setting of a model section that the weights contradict."""
    problems: list[Problem] = []
    for key, value in given.items():
        if (
            key not in own
            or key in FREE
            or _fits(own, key, value)
            or _meant(own, key, own[key]) == _meant(own, key, value)
        ):
            continue
        allowed = json.dumps(own[key])
        if key == "vocab_size":
            allowed = f"{own[key]} or more"
        nearest = json.dumps(own[key])
        message = f"{json.dumps(value)} given; the weights of {source} have {allowed}; nearest: {nearest}"
        problems.append((key, Coded("MDS140", message)))
    return problems


def _meant(own: Mapping[str, Any], key: str, value: Any) -> Any:
    """A setting of the weights' model without the ways to leave it out: null where it follows from others, absent keys
    of a group."""
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if item is not None}
    follows = {"n_kv_heads": own.get("n_heads"), "shared_expert_dim": own.get("expert_dim")}
    width, heads = own.get("dim"), own.get("n_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        follows["head_dim"] = width // heads
    return follows.get(key) if value is None else value


def _fits(own: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether the weights do for another value too: more loops where no table has a row for each, a larger vocabulary,
    or a model without its trained exit gate."""
    if key == "max_loops":
        return not own.get("lora_rank")
    if key == "vocab_size":
        return isinstance(value, int) and value > own[key]
    return bool(key == "halting" and own[key] == "gate" and value == "none")
