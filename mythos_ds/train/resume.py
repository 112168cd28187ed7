"""Where a start begins: afresh, from the run directory's newest checkpoint, or from another run's."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.load import find_checkpoint, list_checkpoints, newest_whole
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.resolve import ResolvedStage
from mythos_ds.config.schema import TrainingConfig
from mythos_ds.errors import CheckpointError
from mythos_ds.io import looked_for
from mythos_ds.log import get_logger
from mythos_ds.parallel.collective import together
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.lr_schedule import learning_rate
from mythos_ds.train.run_changes import FIRST, RunNames, check_former, continue_manifest
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest, planned_stages, staged_manifest
from mythos_ds.weights.model_folder import CONFIG

_logger = get_logger(__name__)

AUTO = "auto"
NO_RESUME = "never"


def choose_checkpoint(
    groups: ParallelGroups, run: RunDirectory, resume: str, new_stage: str | None = None
) -> Path | None:
    """The checkpoint to go on from, verified on all ranks; None for a fresh start.

    resume: "auto" (the newest complete one of `run`), "never", or a path to a checkpoint or a run; new_stage: the
    training stage that begins there, unless `run` has a checkpoint of it already, which is then the one. Raises
    CheckpointError on every rank for a path without a complete checkpoint, or a start that would leave `run` with
    checkpoints of two histories.
    """
    existing = list_checkpoints(groups, run.checkpoints)
    if new_stage is not None and existing and together(groups, lambda: _has_stage(existing[0], new_stage)):
        resume = AUTO
    if resume == NO_RESUME:
        together(groups, lambda: _require_empty(run, existing, "--resume never"))
        return None
    if resume == AUTO:
        tag = find_checkpoint(groups, run.checkpoints)
        together(groups, lambda: _require_any(run.checkpoints, tag, required=bool(existing)))
    else:
        tag = _checkpoint_at(groups, Path(resume))
        together(groups, lambda: _require_one_history(run, existing, tag))
        if tag.resolve().parent != run.checkpoints.resolve():
            together(groups, lambda: _require_new_name(tag, new_stage))
    return tag


def choose_alone(path: Path, new_stage: str | None) -> Path:
    """As `choose_checkpoint` with `--resume path` and a new run directory, for one process that loads no tensor: a file
    of another size than the manifest's is damaged, checksums of terabytes are not read."""
    _refuse_other(path)
    tag: Path | None = path
    if manifest.is_tag(path.name):
        manifest.verify(path, 0, 1, checksums=False)
    else:
        folder = RunDirectory(path).checkpoints
        tag = newest_whole(folder if folder.is_dir() else path, checksums=False)
        _require_any(path, tag, required=True)
    assert tag is not None
    _require_new_name(tag, new_stage)
    return tag


@dataclass(frozen=True)
class Start:
    """Where a start begins: the stage, by its place in the request, and the manifest to follow. `ended`: the stage is
    complete and has been evaluated, so that the next one is due; the place of a stage that was not asked for is -1."""

    index: int
    manifest: RunManifest
    ended: bool = False


def where_to_start(
    tag: Path | None, stages: Sequence[ResolvedStage], names: RunNames, new_stage: str | None = None
) -> Start:
    """The place of a checkpoint in the stages that are asked for, of which `new_stage`, if given, is the first.

    Raises CheckpointError where the settings of a stage that has begun are not those of the run.
    """
    if tag is None:
        if new_stage is not None:
            raise CheckpointError(
                f"--stage {new_stage}: there is no checkpoint to go on from; give --resume RUN as well", code="MDS136"
            )
        return Start(0, staged_manifest(stages))
    step, stored = manifest.tag_step(tag), stored_manifest(tag)
    found = stored.back_at(step)
    ended = len(found.former_stages) < len(stored.former_stages)
    known = [*(former.name for former in found.former_stages), found.stage]
    if new_stage is not None and new_stage not in known:
        return Start(-1, found, ended=True)
    index = _place(known, stages, new_stage, names)
    for number, former in enumerate(found.former_stages[-index:] if index else ()):
        check_former(former, stages[number], number, names)
    here = continue_manifest(found, stages[index], step, names)
    if len(here.lengths) > len(found.lengths):
        _logger.info("%s", _longer_note(found, here, step, stages[index].run.config.training))
    here = replace(here, stages_ahead=planned_stages(stages[index + 1 :]))
    ended = ended and index + 1 < len(stages) and here.total_steps == step
    return Start(index, here, ended)


def _longer_note(before: RunManifest, now: RunManifest, step: int, training: TrainingConfig) -> str:
    """What a larger length changes: the schedule, and with it the learning rate of the next step."""
    own = step - now.start_step
    old, new = (learning_rate(own, training, each.lengths, each.start_lr) for each in (before, now))
    ramp = f", reached over {training.warmup_steps} steps" if training.warmup_steps else ""
    follows = f"the learning rate now follows the schedule of {now.total_steps} steps{ramp}; at step {step + 1}"
    return f"planned length {before.total_steps} -> {now.total_steps} steps: {follows}: {old:.3g} -> {new:.3g}"


def _place(known: list[str | None], stages: Sequence[ResolvedStage], new_stage: str | None, names: RunNames) -> int:
    """Which of the stages that are asked for the run is in, the last of those it has known."""
    asked = [stage.name for stage in stages]
    if asked == [None]:
        return 0
    behind = known.index(new_stage) if new_stage is not None else 0
    for number, name in enumerate(known[behind:]):
        if number >= len(asked) or (name is not None and name != asked[number]):
            listed = ", ".join(str(each) for each in asked)
            had = ", ".join(each or FIRST for each in known)
            raise CheckpointError(
                f"{names.config_file}: stages: {listed} given; {names.run} has trained {had}: stages that have begun "
                "keep their names and their order, and new ones come after them (docs/stages.md)",
                code="MDS136",
            )
    return len(known) - behind - 1


def _has_stage(tag: Path, name: str) -> bool:
    stored = stored_manifest(tag)
    return name in (stored.stage, *(former.name for former in stored.former_stages))


def _require_new_name(tag: Path, new_stage: str | None) -> None:
    """A stage that begins at another run's checkpoint is not one that this run has had: it would be that one still."""
    if new_stage is None:
        return
    manifest_then = stored_manifest(tag).back_at(manifest.tag_step(tag))
    if new_stage in (manifest_then.stage, *(former.name for former in manifest_then.former_stages)):
        raise CheckpointError(
            f"--stage {new_stage}: {tag} is of a run that has had a stage of that name; give another name",
            code="MDS136",
        )


def names_of(tag: Path | None, config_file: str, overrides: Iterable[str]) -> RunNames:
    """What messages call a start from a checkpoint."""
    given = frozenset(override.partition("=")[0].strip() for override in overrides if "=" in override)
    if tag is None:
        return RunNames(config_file, given, "this run", "the run's directory")
    origin = RunDirectory(tag.parent.parent)
    if tag.parent == origin.checkpoints and origin.configuration.is_file():
        return RunNames(config_file, given, str(origin.root), str(origin.configuration))
    return RunNames(config_file, given, str(tag), str(tag / manifest.STATE))


def stored_manifest(tag: Path) -> RunManifest:
    """The manifest of the checkpoint's run, or what the checkpoint says of it where it was copied alone."""
    tag = tag.resolve()
    origin = RunDirectory(tag.parent.parent)
    if tag.parent == origin.checkpoints and origin.manifest.exists():
        return origin.read_manifest()
    state = read_state(tag)
    if state.run is not None:
        return RunManifest.of(state.run, f"{tag / manifest.STATE}: run")
    _logger.warning(
        "%s was copied without %s: its data and its planned lengths are taken to be those of the configuration",
        tag,
        origin.manifest.name,
    )
    return RunManifest.from_config(state.config, state.init_from, str(tag / manifest.STATE))


def _checkpoint_at(groups: ParallelGroups, path: Path) -> Path:
    together(groups, lambda: _refuse_other(path))
    if manifest.is_tag(path.name):
        together(groups, lambda: manifest.verify(path, groups.rank, groups.world_size))
        return path
    folder = RunDirectory(path).checkpoints
    tag = find_checkpoint(groups, folder if folder.is_dir() else path)
    together(groups, lambda: _require_any(path, tag, required=True))
    assert tag is not None
    return tag


def _refuse_other(path: Path) -> None:
    """Raises CheckpointError where a path names nothing, a checkpoint under another name, or a model, which training
    starts from and does not go on with."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: characters that no name can have
        raise CheckpointError(f"--resume: given {looked_for(path)}; no such folder", code="MDS501") from None
    except OSError as error:
        raise CheckpointError(
            f"--resume: given {looked_for(path)}; {str(error.strerror).lower()}", code="MDS501"
        ) from None
    if not manifest.is_tag(path.name) and (path / manifest.STATE).is_file():
        name = manifest.tag_name(read_state(path).step)
        raise CheckpointError(
            f"--resume: given {path}, a checkpoint under another name; rename it to {name}", code="MDS501"
        )
    if path.is_file() or (path / CONFIG).is_file():
        raise CheckpointError(
            f"--resume: given {path}, a model and no training checkpoint; to start a new run from its weights: "
            f"training.init_from={path}",
            code="MDS503",
        )


def _require_any(folder: Path, tag: Path | None, *, required: bool) -> None:
    if tag is None and required:
        raise CheckpointError(
            f"{folder}: no complete checkpoint (the warnings above say what is damaged)", code="MDS502"
        )


def _require_empty(run: RunDirectory, existing: list[Path], why: str) -> None:
    if existing:
        raise CheckpointError(
            f"{run.checkpoints}: holds {existing[0].name}, which {why} would mix with another history; "
            "give a new --run-dir, or remove that folder",
            code="MDS505",
        )


def _require_one_history(run: RunDirectory, existing: list[Path], tag: Path) -> None:
    if tag.resolve().parent != run.checkpoints.resolve():
        _require_empty(run, existing, f"--resume {tag}")
    elif existing[0].name != tag.name:
        raise CheckpointError(
            f"{tag}: {run.root} also holds {existing[0].name}; to branch off at an earlier step give a new --run-dir",
            code="MDS505",
        )
