"""Reads a run's JSON file: strict, with comments (`_` keys), overrides, and all problems reported at once."""

import copy
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos_ds.config import json_values
from mythos_ds.config.error_messages import did_you_mean, explain, section_type
from mythos_ds.config.rules import check
from mythos_ds.config.schema import RunConfig
from mythos_ds.config.secrets import is_secret, secrets, told
from mythos_ds.config.starting_model import complete_model
from mythos_ds.config.training_stages import (
    NAME,
    STAGES,
    TrainingStage,
    drop_alternatives,
    entry_at,
    stage_problems,
    unfold,
)
from mythos_ds.errors import Coded, ConfigError, Problem
from mythos_ds.io import where_searched

COMMENT = "_"
SCHEMA_KEY = "$schema"
SCHEMA_FILE = "schema.json"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, where it came from, and the file's text as it was read.

    `stages`: the settings of each training stage, in order; one without a name where the file lists none.
    """

    stages: tuple[TrainingStage, ...]
    path: Path
    text: str

    @property
    def config(self) -> RunConfig:
        """The settings of the first training stage."""
        return self.stages[0].config


def load_config(name: str, overrides: Sequence[str] = (), *, allow_pickle: bool = False) -> LoadedConfig:
    """Reads and checks a configuration. Imports no torch and starts nothing.

    Args:
        name: a path, or a preset such as `1t` or `1t.json` (looked up in ds_configs/, then in the package).
        overrides: `section.key=value`; the value is JSON, or else a string; null brings the default back.
        allow_pickle: execute what weights hold that keep their configuration in one file with their tensors.

    Raises:
        ConfigError: with every problem found: file, key path, what was given, what is allowed.
    """
    path = find_config(name)
    text = json_values.text_of(path, _shown(path))
    problems: list[Coded] = []
    raw = parse_json(text, _shown(path), problems)
    return LoadedConfig(_checked(raw, overrides, path, problems, allow_pickle), path, text)


def check_config(config: RunConfig, overrides: Sequence[str] = ()) -> LoadedConfig:
    """A configuration made in Python, with overrides, checked as one from a file is; it has the path `python.json`.

    Raises:
        ConfigError: with every problem found, as `load_config` does.
    """
    return check_raw(config.model_dump(mode="json", exclude_unset=True), overrides, Path("python.json"))


def check_raw(raw: dict[str, Any], overrides: Sequence[str], path: Path) -> LoadedConfig:
    """The sections of a run as JSON values, with overrides, checked as a file at `path` is. `raw` becomes what such a
    file would hold.

    Raises:
        ConfigError: with every problem found, as `load_config` does.
    """
    checked = _checked(raw, overrides, path, [])
    return LoadedConfig(checked, path, json.dumps(raw, indent=2) + "\n")


def _checked(
    raw: dict[str, Any], overrides: Sequence[str], path: Path, problems: list[Coded], allow_pickle: bool = False
) -> tuple[TrainingStage, ...]:
    """The stages of `raw` with overrides, or ConfigError with `problems` and every other one."""
    overridden = apply_overrides(raw, overrides, problems)
    unusable = json_values.unusable(raw) or secrets(raw)
    stages, found = ((), unusable) if unusable else _staged(raw, allow_pickle)
    problems += [message.after(f"{_source(key, path, overridden)}: {key}: ") for key, message in found]
    if problems:
        raise ConfigError(problems)
    return stages


def find_config(name: str) -> Path:
    """The file a name stands for: a path, or a preset beside the package, in ./ds_configs or inside it."""
    given = Path(name)
    if _is_there(name):
        return given
    folders = _preset_folders()
    file_name = name if name.endswith(".json") else f"{name}.json"
    if given.name == name:
        for folder in folders:
            if (folder / file_name).is_file():
                return folder / file_name
    presets = list_presets()
    hint = did_you_mean(given.name.removesuffix(".json"), presets)
    raise ConfigError(
        f"{name}: no such file and no such preset{hint}{where_searched(name)}; presets: {', '.join(presets)}",
        code="MDS104",
    )


def _is_there(name: str) -> bool:
    """Whether there is a file of that name. Raises ConfigError where that cannot be found out."""
    try:
        return not stat.S_ISDIR(os.stat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: characters that no name can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{ascii(name)[1:-1]}: not readable ({reason})", code="MDS106") from None


def list_presets() -> list[str]:
    """Names of the presets that can be found, smallest first where the name is a size."""
    names = {path.stem for folder in _preset_folders() for path in folder.glob("*.json")} - {Path(SCHEMA_FILE).stem}
    return sorted(names, key=_preset_size)


def _preset_size(name: str) -> tuple[float, str]:
    scale = {"m": 1e6, "b": 1e9, "t": 1e12}.get(name[-1:], 0.0)
    return (float(name[:-1]) * scale, name) if scale and name[:-1].isdigit() else (0.0, name)


def _preset_folders() -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    folders = [package.parent / "ds_configs", Path.cwd() / "ds_configs", package / "presets"]
    return [folder for folder in folders if folder.is_dir()]


def parse_json(text: str, source: str, problems: list[Coded]) -> dict[str, Any]:
    """The object a text holds, without comments. Duplicate keys and NaN are added to `problems`.

    Raises:
        ConfigError: the text is not JSON (with line and column), or not an object.
    """

    def refuse_constant(constant: str) -> None:
        problems.append(Coded("MDS105", f"{source}: {constant} is not a number that JSON or a run knows"))

    try:
        parsed = json_values.parse(text, source, refuse_constant)
    except json.JSONDecodeError as error:
        lines = text.split("\n")  # as the decoder counts
        line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
        where = f"line {error.lineno} column {error.colno}"
        message = f"{source}: {where}: not valid JSON: {error.msg}; the line reads: {line[:80]}"
        raise ConfigError(message, code="MDS105") from None
    if not isinstance(parsed, json_values.Pairs):
        raise ConfigError(f"{source}: a JSON object with the sections of a run is expected", code="MDS105")
    plain: dict[str, Any] = _plain(parsed, source, "", problems)
    plain.pop(SCHEMA_KEY, None)
    return plain


def _plain(value: Any, source: str, at: str, problems: list[Coded], depth: int = 0) -> Any:
    """Dicts without comment keys; a key given twice is a problem. Raises ConfigError for too deep nesting."""
    if depth > json_values.MAX_DEPTH:
        message = f"{source}: {at[:80]}: nested too deep; allowed: {json_values.MAX_DEPTH} levels"
        raise ConfigError(message, code="MDS108")
    if isinstance(value, json_values.Pairs):
        result: dict[str, Any] = {}
        for key, item in value:
            here = f"{at}.{key}" if at else key
            if key.startswith(COMMENT):
                # Left out of the configuration, but not of the file's copy in the run's directory.
                noted = _plain(item, source, here, problems, depth + 1)
                found = [told(here)] if is_secret(key, noted) else secrets(noted, here)
                problems += [message.after(f"{source}: {key}: ") for key, message in found]
                continue
            if key in result:
                problems.append(Coded("MDS107", f"{source}: {here}: given twice; keep one"))
            result[key] = _plain(item, source, here, problems, depth + 1)
        return result
    if isinstance(value, list):
        return [_plain(item, source, f"{at}[{index}]", problems, depth + 1) for index, item in enumerate(value)]
    return value


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], problems: list[Coded]) -> set[str]:
    """Writes `section.key=value`, and `stages.NAME.section.key=value` of a stage by name or number, into `raw`; returns
    the key paths written. Bad ones go to `problems`."""
    written: set[str] = set()
    named: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts, target, before = key.strip().split("."), raw, ""
        if parts[0] == STAGES and len(parts) > 1:
            entry = entry_at(raw, parts[1])
            if entry is None:
                wrong = f"no stage {parts[1]!r}; allowed: the name or number of a stage"
                problems.append(Coded("MDS135", f"override {override!r}: {wrong}"))
                continue
            (index, target), parts = entry, parts[2:]
            before = f"{STAGES}[{index}]."
        if not equals or not all(parts) or len(parts) < 2:
            wrong = "allowed: section.key=value, such as training.lr=0.001" + _with_section(parts, text)
            problems.append(Coded("MDS109", f"override {override!r}: {wrong}"))
            continue
        hidden = entry_at(raw, "0") if not before else None
        if hidden is not None and parts[1] in (_section(hidden[1], parts[0]) or {}):
            name = hidden[1].get(NAME)
            wrong = f"stage {name!r} sets this; write {STAGES}.{name}.{key.strip()}="
            problems.append(Coded("MDS111", f"override {override!r}: {wrong}"))
        elif _write(target, parts, _override_value(text, problems)):
            written.add(before + ".".join(parts))
            named.setdefault(before, (target, {}))[1].setdefault(parts[0], {})[parts[1]] = None
        else:
            wrong = f"'{'.'.join(parts[:-1])}' is a value, not a section"
            problems.append(Coded("MDS109", f"override {override!r}: {wrong}"))
    for target, given in named.values():
        drop_alternatives(target, given)
    return written


def _with_section(parts: Sequence[str], text: str) -> str:
    """The setting that was meant where only its section is missing."""
    for section, field in RunConfig.model_fields.items():
        if (kind := section_type(field.annotation)) and len(parts) == 1 and parts[0] in kind.model_fields:
            return f"; did you mean {section}.{parts[0]}={text or 'VALUE'}?"
    return ""


def _section(raw: dict[str, Any], name: str) -> dict[str, Any] | None:
    found = raw.get(name)
    return found if isinstance(found, dict) else None


def _override_value(text: str, problems: list[Coded]) -> Any:
    try:
        pairs = json_values.parse(text, "override", float)
    except ValueError:
        return text
    return _plain(pairs, "override", "", problems)


def _write(raw: dict[str, Any], parts: list[str], value: Any) -> bool:
    target = raw
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            return False
    if value is None:
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value
    return True


def _staged(raw: dict[str, Any], allow_pickle: bool = False) -> tuple[tuple[TrainingStage, ...], list[Problem]]:
    """The training stages, and (key path, message) of each problem with single values and with combinations. One that a
    stage has inherited is told once."""
    contradictions = complete_model(raw, allow_pickle=allow_pickle)
    if STAGES not in raw:
        config, problems = _validated(raw, contradictions)
        return (() if config is None else (TrainingStage(None, config),)), problems
    entries, problems = unfold(raw)
    stages: list[TrainingStage] = []
    told: list[Problem] = []
    for number, entry in enumerate(entries):
        config, found = _validated(entry.sections, [] if number else contradictions)
        own = stage_problems(entry, entries[number - 1] if number else None)
        named = [entry.told(key, message) for key, message in found if (key, message) not in told]
        known = {key for key, _ in problems + own}
        problems += own + [(key, message) for key, message in named if key not in known]
        told = found
        if config is not None:
            stages.append(TrainingStage(entry.name, config))
    return tuple(stages), problems


def _validated(raw: dict[str, Any], contradictions: list[Problem]) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration of one stage's sections, and what is wrong with them beside `contradictions`."""
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        wrong = explain(error)
        problems = [found for found in contradictions if found[0] not in dict(wrong)] + wrong
        problems += _other_problems(raw, error, {key for key, _ in problems})
        if any(key == "training.init_from" for key, _ in contradictions):  # which would have said what the model is
            problems = [(key, message) for key, message in problems if key.partition(".")[0] != "model"]
        return None, problems
    return config, contradictions + check.check(config)


def _other_problems(raw: dict[str, Any], error: ValidationError, wrong: set[str]) -> list[Problem]:
    """Problems with combinations of the values that are right one by one."""
    remaining = copy.deepcopy(raw)
    for item in error.errors(include_url=False):
        _remove(remaining, item["loc"])
    found = check.check_partial(_constructed(remaining))
    return [(key, message) for key, message in found if key not in wrong]


def _constructed(raw: dict[str, Any]) -> RunConfig:
    """The sections as far as they go, unvalidated; a required value that is absent is an absent attribute."""
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        value, section = raw.get(name), section_type(field.annotation)
        if section is not None and (isinstance(value, dict) or field.is_required()):
            sections[name] = section.model_construct(**(value or {}))
        elif value is not None:
            sections[name] = value
    return RunConfig.model_construct(**sections)


def _remove(raw: dict[str, Any], location: tuple[str | int, ...]) -> None:
    """Drops the section or the setting that `location` lies in."""
    section, *rest = location
    inside = raw.get(str(section))
    if rest and isinstance(inside, dict):
        inside.pop(str(rest[0]), None)
    else:
        raw.pop(str(section), None)


def _source(key: str, path: Path, overridden: set[str]) -> str:
    inside = any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in overridden)
    return "override" if inside or any(name.startswith(f"{key}.") for name in overridden) else _shown(path)


def _shown(path: Path) -> str:
    """The path as a user would write it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
