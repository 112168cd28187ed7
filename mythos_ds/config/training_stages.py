"""The training stages of a run's file: a list of entries, each with what differs from the stage before it. No torch.

The first stage starts from the file's own sections. Lengths and batch ramps belong to one stage and are not inherited;
null brings a default back.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mythos_ds.config.error_messages import did_you_mean, show
from mythos_ds.config.schema import ModelConfig, RunConfig, TrainingConfig
from mythos_ds.errors import Coded, ConfigError, Problem, coded

STAGES = "stages"
NAME = "name"
SECTIONS = ("model", "training", "data", "checkpoint", "monitor")
MODEL_KEYS = ("rope_theta", "rope_scaling", "mean_recurrence", "max_loops")
"""Settings of the model that may change between stages: no weight depends on them, but for max_loops with LoRA."""
FIXED_TRAINING_KEYS = ("optimizer", "seed", "init_from")
ALTERNATIVES = (
    ("training.max_steps", "training.max_tokens"),
    ("data.corpus", "data.datasets"),
)
"""Settings of which one, given later, replaces the other one that was there."""
_OWN = ("max_steps", "max_tokens", "global_batch_ramp")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NAMES = "letters, digits, '_' and '-', beginning with a letter"
_OUTSIDE = ("parallel", "cluster", "deepspeed")


@dataclass(frozen=True)
class TrainingStage:
    """A part of a run with settings of its own. `name`: None where the file lists no stages."""

    name: str | None
    config: RunConfig


@dataclass(frozen=True)
class StageEntry:
    """An entry of the list, with the whole sections of its stage as JSON values."""

    index: int
    name: str
    given: dict[str, Any]
    sections: dict[str, Any]

    def told(self, key: str, message: Coded) -> Problem:
        """A problem of the stage's sections with its place."""
        if self.index and not _is_given(self.given, key):
            message = Coded(message.code, message.replace("remove it", "write null for it in this stage"))
        return self.key(key), message

    def key(self, key: str) -> str:
        """The path of a setting: in the entry, or in the file's own sections where the first entry leaves it there."""
        if self.index == 0 and not _is_given(self.given, key):
            return key
        return f"{STAGES}[{self.index}].{key}"


def stages_from(stages: Sequence[TrainingStage], name: str | None, source: str) -> tuple[TrainingStage, ...]:
    """The stages of a file from the one called `name` on, all of them for None; the file's settings under that name
    where it lists none. Raises ConfigError for a name that it does not list, or that no stage can have."""
    names = [stage.name for stage in stages]
    if name is None:
        return tuple(stages)
    if not _is_name(name):
        raise ConfigError(f"--stage: given {name!r}; allowed: {_NAMES}", code="MDS131")
    if names == [None]:
        return (TrainingStage(name, stages[0].config),)
    if name not in names:
        hint = did_you_mean(name, [str(each) for each in names])
        listed = ", ".join(map(str, names))
        raise ConfigError(f"--stage: given {name!r}; {source} lists {listed}{hint}", code="MDS135")
    return tuple(stages[names.index(name) :])


def unfold(raw: dict[str, Any]) -> tuple[list[StageEntry], list[Problem]]:
    """The entries of a file's list, and (key path, message) of each that is none."""
    listed = raw[STAGES]
    if not isinstance(listed, list) or not listed:
        allowed = f"a list of at least one {{{NAME}, {', '.join(SECTIONS)}}}"
        return [], [(STAGES, Coded("MDS130", f"{show(listed)} given; allowed: {allowed}"))]
    entries: list[StageEntry] = []
    problems: list[Problem] = []
    sections = {key: value for key, value in raw.items() if key != STAGES}
    for index, given in enumerate(listed):
        if not isinstance(given, dict):
            problems.append((f"{STAGES}[{index}]", Coded("MDS130", f"{show(given)} given; allowed: an object")))
            continue
        problems += _name_problems(given, index, [entry.name for entry in entries])
        problems += _key_problems(given, index)
        sections = _merged(sections, given, first=index == 0)
        entries.append(StageEntry(index, str(given.get(NAME)), given, sections))
    return entries, problems


def stage_problems(entry: StageEntry, former: StageEntry | None) -> list[Problem]:
    """What is wrong with an entry beside the one before it, whatever each setting allows by itself."""
    training, own = entry.given.get("training"), []
    if former is not None and not (isinstance(training, dict) and {"max_steps", "max_tokens"} & set(training)):
        key = f"{STAGES}[{entry.index}].training.max_steps"
        own.append((key, Coded("MDS133", "missing; required: the stage's own length, max_steps or max_tokens")))
    if former is not None and (message := loops_problem(former.sections.get("model"), entry.sections.get("model"))):
        own.append((entry.key("model.max_loops"), message))
    return own


@coded("MDS134")
def loops_problem(before: Any, now: Any) -> str | None:
    """Why `max_loops` cannot change between two model sections, where it does and cannot."""
    if not isinstance(before, dict) or not isinstance(now, dict) or not now.get("lora_rank"):
        return None
    old, new = before.get("max_loops"), now.get("max_loops")
    if old == new:
        return None
    return (
        f"{new} given; allowed: {old}, as before: the depth-wise LoRA (lora_rank {now['lora_rank']}) has a row per loop"
    )


def entry_at(raw: dict[str, Any], place: str) -> tuple[int, dict[str, Any]] | None:
    """The entry that an override means by its number or its name; None where there is none."""
    listed = raw.get(STAGES)
    for index, entry in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(entry, dict) and place in (str(index), entry.get(NAME)):
            return index, entry
    return None


def as_file(stages: list[tuple[str | None, dict[str, Any]]]) -> dict[str, Any]:
    """Sections of stages as one file that says the same: those of the first, and in the list what differs after it."""
    (name, first), *_ = stages
    if name is None:
        return first
    entries: list[dict[str, Any]] = [{NAME: name}]
    for (_, before), (own, now) in pairwise(stages):
        entry: dict[str, Any] = {NAME: own}
        inherited = _merged(before, {}, first=False)
        for section in SECTIONS:
            old, new = inherited.get(section) or {}, now.get(section) or {}
            changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
            length = {key: new[key] for key in ("max_steps", "max_tokens") if section == "training" and new.get(key)}
            changed = {key: value for key, value in {**changed, **length}.items() if key not in _OWN or value}
            if changed:
                entry[section] = changed
        entries.append(entry)
    return {**first, STAGES: entries}


def given_file(stages: Sequence[TrainingStage]) -> dict[str, Any]:
    """The stages as one file, of JSON values, with the settings that were given, and no others."""
    contents: list[tuple[str | None, dict[str, Any]]] = []
    for stage in stages:
        given = stage.config.model_dump(mode="json", exclude_unset=True)
        before, whole = contents[-1][1] if contents else {}, stage.config.model_dump(mode="json")
        for section in SECTIONS:
            own = given.get(section)
            if own is None or not before.get(section):
                continue
            # What this stage brings back to its default would else be inherited.
            own |= {key: whole[section][key] for key in before[section] if key not in own}
        contents.append((stage.name, given))
    return as_file(contents)


def _merged(sections: dict[str, Any], given: dict[str, Any], *, first: bool) -> dict[str, Any]:
    merged = copy.deepcopy(sections)
    training = merged.get("training")
    if not first and isinstance(training, dict):
        for key in _OWN:
            training.pop(key, None)
    for section in SECTIONS:
        own = given.get(section)
        if own is None:
            continue
        inherited = merged.get(section)
        if not isinstance(own, dict) or not isinstance(inherited, dict | None):
            merged[section] = own
            continue
        whole = {**(inherited or {}), **copy.deepcopy(own)}
        merged[section] = {key: value for key, value in whole.items() if value is not None}
    drop_alternatives(merged, given)
    return merged


def drop_alternatives(sections: dict[str, Any], given: dict[str, Any]) -> None:
    """Remove from `sections` each setting that another one in `given` replaces."""
    for pair in ALTERNATIVES:
        for chosen, other in (pair, pair[::-1]):
            section, field = other.split(".")
            if _is_given(given, chosen) and not _is_given(given, other) and isinstance(sections.get(section), dict):
                sections[section].pop(field, None)


def _is_given(given: dict[str, Any], key: str) -> bool:
    section, _, field = key.partition(".")
    inside = given.get(section)
    return (section in given and not field) or (isinstance(inside, dict) and re.split(r"[.\[]", field)[0] in inside)


def index_of(name: str, stages: Sequence[TrainingStage], file: object) -> int:
    """The number of the stage that the option --stage names. Raises ConfigError where the file has none of it."""
    names = [stage.name for stage in stages]
    if name in names:
        return names.index(name)
    listed = ", ".join(each for each in names if each is not None) or "no training stages"
    hint = did_you_mean(name, [each for each in names if each is not None])
    raise ConfigError(f"--stage: given {name!r}; {file} lists {listed}{hint}", code="MDS135")


def _name_problems(given: dict[str, Any], index: int, before: list[str]) -> list[Problem]:
    key, name = f"{STAGES}[{index}].{NAME}", given.get(NAME)
    if name is None:
        return [(key, Coded("MDS131", "missing; required: a word that names the stage"))]
    if not _is_name(name):
        return [(key, Coded("MDS131", f"{show(name)} given; allowed: {_NAMES}"))]
    twice = Coded("MDS131", f"{show(name)} names two stages; give each its own")
    return [(key, twice)] if name in before else []


def _is_name(name: Any) -> bool:
    """Whether a stage can be called so."""
    return isinstance(name, str) and len(name) <= 100 and _NAME.fullmatch(name) is not None


def _key_problems(given: dict[str, Any], index: int) -> list[Problem]:
    problems: list[Problem] = []
    for section, inside in given.items():
        at = f"{STAGES}[{index}].{section}"
        if section in _OUTSIDE:
            way = "a file of its own with --resume OLD --run-dir NEW --stage NAME"
            message = f"given in a stage; it is the same in all stages of a file; another one: {way}"
            problems.append((at, Coded("MDS132", message)))
        elif section not in (NAME, *SECTIONS):
            hint = did_you_mean(section, [NAME, *SECTIONS]) or f"; allowed here: {NAME}, {', '.join(SECTIONS)}"
            problems.append((at, Coded("MDS101", f"unknown key{hint}")))
        elif isinstance(inside, dict):
            problems += [(f"{at}.{key}", fixed) for key in inside if (fixed := _fixed(section, key)) is not None]
    return problems


def may_change(section: str, key: str) -> bool:
    """Whether a stage may give this setting."""
    return _fixed(section, key) is None


@coded("MDS132")
def _fixed(section: str, key: str) -> str | None:
    if section == "model" and key in ModelConfig.model_fields and key not in MODEL_KEYS:
        return f"given in a stage; the weights depend on it; allowed: {', '.join(MODEL_KEYS)}"
    if section == "training" and key in TrainingConfig.model_fields and key in FIXED_TRAINING_KEYS:
        return "given in a stage; allowed: in the file's own section, for all stages"
    return None
