"""What a start asks for against what its run pins: a run goes on, grows longer or begins a training stage, or the
message says what differs and how to make it a stage. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mythos_ds.config.error_messages import show
from mythos_ds.config.resolve import ResolvedStage
from mythos_ds.config.schema import ModelConfig, RunConfig, TrainingConfig
from mythos_ds.config.training_stages import FIXED_TRAINING_KEYS, MODEL_KEYS, loops_problem
from mythos_ds.data.datasets import data_identity
from mythos_ds.errors import CheckpointError
from mythos_ds.train.lr_schedule import learning_rate
from mythos_ds.train.run_manifest import (
    DATA_FILES,
    DATASET,
    OPENED,
    WEIGHTS,
    FormerStage,
    Phase,
    RunManifest,
    data_files,
    longer,
    new_manifest,
    next_seed,
)

FIRST = "first"
"""What messages call the first stage of a run whose file listed none."""
_DATA_KEYS = {"content": "datasets", "weights": "datasets", "conversations": "datasets"}
"""Which setting names a part of the data's identity, where that is called otherwise."""
_LOSS_MASK = "conversations.loss_mask"
_ANOTHER_RUN = "begin another run in a new --run-dir, without --resume; training.init_from takes this one's weights"


@dataclass(frozen=True)
class RunNames:
    """What messages call a start and its run: the configuration's file, the settings that the command line gives, the
    stored run's folder, and where its configuration is stored."""

    config_file: str
    overridden: frozenset[str]
    run: str
    stored_file: str

    def now(self, key: str) -> str:
        """Where a setting of this start comes from."""
        return "on the command line" if key in self.overridden else f"in {self.config_file}"


@dataclass(frozen=True)
class Change:
    """A setting that differs: its key, its value now and the pinned one; of data, texts that say so."""

    key: str
    now: Any
    then: Any

    @property
    def may_be_staged(self) -> bool:
        """Whether a training stage may change it."""
        section, _, field = self.key.partition(".")
        if section == "model":
            return field.partition(".")[0] in MODEL_KEYS
        return section == "data" or field not in FIXED_TRAINING_KEYS

    def line(self, names: RunNames) -> str:
        """The change in words."""
        if self.key.startswith("data."):
            return f"{self.key}: {self.now} now, {self.then} when the run was started"
        now, then = f"{show(self.now)} {names.now(self.key)}", f"{show(self.then)} in {names.stored_file}"
        return f"{self.key}: {now} now, {then} when the run was started"


def continue_manifest(manifest: RunManifest, stage: ResolvedStage, step: int, names: RunNames) -> RunManifest:
    """The manifest for going on at `step` with the settings of the training stage that it is in.

    A larger length appends a phase; phases and stages decided on but never begun are forgotten. Raises CheckpointError
    naming every pinned value that differs, or a length below the pinned one.
    """
    wanted, manifest = new_manifest(stage.run), manifest.back_at(step)
    problems = _other_weights(manifest, wanted)
    length, planned = wanted.total_steps, manifest.total_steps - manifest.start_step
    if length < planned:
        problems.append(
            f"training length: {length} steps now, {planned} when the run was started; "
            "the sample order depends on the length: keep it, or raise it to train on"
        )
    _refuse(changes(manifest, wanted), stage.run.config, names, problems)
    named = replace(manifest, stage=manifest.stage or stage.name)
    return named if length == planned else longer(named, manifest.start_step + length, step)


def with_dataset(manifest: RunManifest, identity: dict[str, Any], config: RunConfig, names: RunNames) -> RunManifest:
    """The manifest with its dataset pinned, and the names of the files beside it. Raises CheckpointError when another
    one is pinned already."""
    stored, files = manifest.pinned.get(DATASET), data_files(config.data)
    if stored is not None:
        _refuse(_data_changes(stored, identity, manifest.pinned.get(DATA_FILES, {}), files), config, names)
    return replace(manifest, pinned={**manifest.pinned, DATASET: identity, DATA_FILES: files})


def trained_on_before(manifest: RunManifest) -> list[str]:
    """A note for each former training stage that has read what this one's losses on held-out text are computed on, by
    digests and shares of the documents."""
    held_out, notes = _shares(manifest.pinned, held_out=True), []
    for former in manifest.former_stages:
        read = _shares(former.pinned, held_out=False)
        seen = [content for content, (start, _) in held_out.items() if start < read.get(content, (0.0, 0.0))[1] - 1e-9]
        if seen:
            names = _named(former.pinned.get(DATA_FILES, {}).get("datasets"))
            notes.append(
                f"held-out text of stage {manifest.stage or FIRST} was trained on in stage {former.name or FIRST} "
                f"({names}): its losses are too low; keep data.split, or give data.validation other text"
            )
    return notes


def _shares(pinned: dict[str, Any], *, held_out: bool) -> dict[str, tuple[float, float]]:
    """The share of the documents of each dataset, by its digest, that is held out or is trained on."""
    data = pinned.get(DATASET, {})
    validation, split = data.get("validation"), data.get("split", [1.0, 0.0, 0.0])
    if held_out and validation is not None:
        return dict.fromkeys(validation["content"], (0.0, 1.0))
    train, end = split[0] / sum(split), (split[0] + split[1]) / sum(split)
    share = (train, end) if held_out else (0.0, train)
    return dict.fromkeys(data.get("content", ()), share) if share[0] < share[1] else {}


@dataclass(frozen=True)
class StageEnd:
    """How a training stage ended: the completed steps, the training section of its last checkpoint, and its losses on
    held-out text as in `FormerStage`."""

    step: int
    training: dict[str, Any]
    first_validation_loss: float | None
    validation: list[dict[str, Any]]


def begin_stage(manifest: RunManifest, end: StageEnd, stage: ResolvedStage, names: RunNames) -> RunManifest:
    """The manifest of the training stage that begins where the one of `manifest` ended. Raises CheckpointError for
    settings that no stage may change, or a name that the run has had."""
    manifest = manifest.back_at(end.step)
    wanted = new_manifest(stage.run)
    used = [former.name for former in manifest.former_stages] + [manifest.stage]
    problems = [change.line(names) for change in changes(manifest, wanted) if not change.may_be_staged]
    problems += _other_weights(manifest, wanted)
    if (loops := loops_problem(manifest.pinned["model"], wanted.pinned["model"])) is not None:
        problems.append(f"model.max_loops: {loops}")
    if stage.name in used:
        problems.append(f"stage {stage.name!r}: {names.run} has had a stage of that name; give another name")
    if problems:
        raise CheckpointError(
            "\n".join([f"stage {stage.name!r} cannot go on from {names.run}:", *problems]), code="MDS504"
        )
    phases = tuple(replace(phase, end_step=min(phase.end_step, end.step)) for phase in manifest.phases)
    own = end.step - manifest.start_step
    training = TrainingConfig.model_validate(end.training)
    former = FormerStage(
        name=manifest.stage,
        phases=phases,
        pinned=manifest.pinned,
        samples=manifest.batches.samples(own),
        tokens=manifest.batches.samples(own) * int(manifest.pinned["seq_len"]),
        final_lr=learning_rate(own - 1, training, manifest.lengths, manifest.start_lr),
        first_validation_loss=end.first_validation_loss,
        validation=end.validation,
    )
    history = (*manifest.former_stages, former)
    weights = {WEIGHTS: manifest.pinned[WEIGHTS]} if WEIGHTS in manifest.pinned else {}
    seed = next_seed(replace(manifest, phases=phases))
    phase = Phase(end.step, end.step + stage.run.max_steps, seed, decided_at=end.step)
    return RunManifest({**wanted.pinned, **weights}, (phase,), stage.name, history)


def check_former(former: FormerStage, stage: ResolvedStage, index: int, names: RunNames) -> None:
    """Raises CheckpointError where the file's settings of a stage that is behind are not those it was trained with; its
    data may be gone, or elsewhere."""
    wanted = new_manifest(stage.run)
    pinned = RunManifest(former.pinned, former.phases)
    found = [f"stages[{index}].{change.line(names)}" for change in changes(pinned, wanted)]
    length = former.end_step - former.phases[0].start_step
    if wanted.total_steps != length:
        found.append(f"stages[{index}]: training length: {wanted.total_steps} steps now, {length} when it was trained")
    stored, files = former.pinned.get(DATA_FILES), data_files(stage.run.config.data)
    if stored is not None and stored != files and not _is_moved(former, stage.run.config):
        found += [
            f"stages[{index}].data.{key}: {_named(files.get(key))} now, {_named(stored.get(key))} when it was trained"
            for key in dict.fromkeys((*stored, *files))
            if stored.get(key) != files.get(key)
        ]
    if found:
        head = f"stage {former.name or FIRST!r} of {names.run} is behind and cannot change:"
        advice = "undo the change, and put what is to be trained now into a stage that comes after (docs/stages.md)"
        raise CheckpointError("\n".join([head, *found, advice]), code="MDS504")


def _is_moved(former: FormerStage, config: RunConfig) -> bool:
    """Whether the files of other names are what the stage has read."""
    pinned = former.pinned.get(DATASET)
    return pinned is not None and data_identity(config.data, config.model.vocab_size) == pinned


def changes(manifest: RunManifest, wanted: RunManifest) -> list[Change]:
    """Every pinned setting that differs, but for what is opened later."""
    old, new = (
        {name: value for name, value in pinned.items() if name not in OPENED}
        for pinned in (manifest.pinned, wanted.pinned)
    )
    old["model"] = {**_added_later(), **old["model"]}
    return [Change(_config_key(key), now, then) for key, now, then in _differences("", old, new)]


def _config_key(key: str) -> str:
    if key == "injection_has_own_lr":
        return "training.injection_lr"
    return key if key.startswith("model.") else f"training.{key}"


def _data_changes(old: Any, new: Any, old_files: dict[str, Any], new_files: dict[str, Any]) -> list[Change]:
    found: dict[str, Change] = {}
    for key, now, then in _differences("", old, new):
        first = key.partition(".")[0]
        name = "loss_mask" if key == _LOSS_MASK else _DATA_KEYS.get(first, first)
        values = [json.dumps(now), json.dumps(then)]
        if name in new_files or name in old_files:
            values = [_named(new_files.get(name)), _named(old_files.get(name))]
            if values[0] == values[1] and first != "weights":
                values[0] += " (with another content)"
        if first == "weights":
            values = [f"{value} with the weights {json.dumps(w)}" for value, w in zip(values, (now, then), strict=True)]
        found.setdefault(f"data.{name}", Change(f"data.{name}", *values))
    return list(found.values())


def _named(files: Any) -> str:
    if files is None:
        return "none, or of an unknown name"
    return ", ".join(files) if isinstance(files, list) else str(files)


def _refuse(found: list[Change], config: RunConfig, names: RunNames, problems: Sequence[str] = ()) -> None:
    """Raises CheckpointError with what has changed and the ways out, and with other `problems`."""
    if not found and not problems:
        return
    lines = [f"{names.run} was started with other settings:", *(change.line(names) for change in found), *problems]
    if found and all(change.may_be_staged for change in found):
        entry: dict[str, Any] = {"name": "NAME"}
        sections = config.model_dump(mode="json", exclude_unset=True)
        length = "max_steps" if config.training.max_steps is not None else "max_tokens"
        entry["training"] = {length: getattr(config.training, length)}
        for change in found:
            section, _, field = change.key.partition(".")
            field = field.partition(".")[0]
            entry.setdefault(section, {})[field] = sections.get(section, {}).get(field)
        lines += [
            "to go on with these as a new training stage (docs/stages.md), either change the settings back and list",
            f'  "stages": [{{"name": "{FIRST}"}}, {json.dumps(entry)}]',
            f"or keep them and add --resume {names.run} --run-dir NEW --stage NAME; "
            "the stage then has this length of its own",
            f"else undo the change, or {_ANOTHER_RUN}",
        ]
    elif found:
        lines.append(f"no training stage may change all of these: undo the change, or {_ANOTHER_RUN}")
    raise CheckpointError("\n".join(lines), code="MDS504")


def _other_weights(manifest: RunManifest, wanted: RunManifest) -> list[str]:
    """The weights are gone from a run that goes on; another name for them would have no effect."""
    old, new = (pinned.pinned.get(WEIGHTS, {}).get("name") for pinned in (manifest, wanted))
    if new is None or new == old:
        return []
    return [f"training.init_from: {new!r} now, {'random weights' if old is None else repr(old)} at the run's start"]


def _added_later() -> dict[str, Any]:
    """What a key of the model meant before there was such a key: its default."""
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def _differences(prefix: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(key, value now, value then) of what differs in nested values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = ((f"{prefix}.{key}".lstrip("."), old.get(key), new.get(key)) for key in keys)
        return [found for pair in pairs for found in _differences(*pair)]
    return [] if old == new else [(prefix, new, old)]
