"""A run file that trains from given weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.loader import LoadedConfig, apply_overrides, check_raw
from mythos_ds.config.schema import DataConfig
from mythos_ds.config.starting_model import model_section
from mythos_ds.conversion.merge import newest_tag, tokenizer_of
from mythos_ds.data.builtin import existing_builtin
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import Coded, ConfigError, MythosError
from mythos_ds.weights.built_in import model_path
from mythos_ds.weights.model_folder import CONFIG


def init_config(
    weights: Path, like: LoadedConfig, overrides: Sequence[str] = (), *, data: Sequence[Path] = ()
) -> tuple[LoadedConfig, list[str]]:
    """A run that starts from `weights` and trains as `like` does, or its first training stage, and what there is to say
    of it.

    Its model section is the weights' own, with every key. data: prefixes of prepared data, in place of those of `like`;
    they are read with the weights' tokenizer. Raises ConfigError with every problem of the run, and for weights that
    are none.
    """
    raw = like.config.model_dump(mode="json", exclude_unset=True)
    asked: dict[str, Any] = {}
    problems: list[Coded] = []
    apply_overrides(asked, overrides, problems)
    if problems:
        raise ConfigError(problems)
    given = asked.get("model", {})
    raw["model"] = model_section(weights, given if isinstance(given, dict) else {})
    raw["training"]["init_from"] = str(weights)
    tokenizer, section = _tokenizer(weights), raw["data"]
    if data:
        section.pop("corpus", None)
        section["datasets"] = [{"prefix": str(prefix)} for prefix in data]
    if section.get("datasets") and tokenizer is not None:
        section["tokenizer"] = str(tokenizer.path)
    run = check_raw(raw, overrides, like.path)
    notes = _notes(run.config.data, weights, tokenizer)
    if (first := like.stages[0].name) is not None:
        notes.append(f"{like.path.name}: of its training stages the first, {first}, is taken; write the others anew")
    return run, notes


def _tokenizer(weights: Path) -> Tokenizer | None:
    """The weights' own; None where they have none."""
    place = model_path(weights)
    try:
        if place.is_dir() and not (place / CONFIG).is_file():
            return Tokenizer.load(tokenizer_of(read_state(newest_tag(place))))
        return Tokenizer.load(place if place.is_dir() else place.parent)
    except MythosError:
        return None


def _notes(data: DataConfig, weights: Path, tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return [f"{weights} has no tokenizer: data.{'tokenizer' if data.datasets else 'corpus'} is unchecked"]
    if data.corpus != "builtin":
        return []
    try:
        used = Tokenizer.load(existing_builtin(Path(data.data_dir)).tokenizer)
    except MythosError:  # made at the run's start
        used = None
    if used is not None and used.sha256 == tokenizer.sha256:
        return []
    return [
        "the built-in corpus has a tokenizer of its own, which is not the weights'; to train on other text: mythos-ds "
        f"prepare-data INPUT --tokenizer {weights} --output PREFIX, then this command with --data PREFIX"
    ]


def file_text(run: LoadedConfig) -> str:
    """The run as the text of a file, with the keys of every section."""
    return json.dumps(run.config.model_dump(mode="json"), indent=2) + "\n"
