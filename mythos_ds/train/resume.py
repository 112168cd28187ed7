"""Where a start begins: afresh, from the run directory's newest checkpoint, or from another run's."""

import os
from pathlib import Path

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.load import find_checkpoint, list_checkpoints
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.errors import CheckpointError
from mythos_ds.io import looked_for
from mythos_ds.log import get_logger
from mythos_ds.parallel.collective import together
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest, continue_manifest
from mythos_ds.weights.model_folder import CONFIG

_logger = get_logger(__name__)

AUTO = "auto"
NO_RESUME = "never"


def choose_checkpoint(groups: ParallelGroups, run: RunDirectory, resume: str) -> Path | None:
    """The checkpoint to go on from, verified on all ranks; None for a fresh start.

    resume: "auto" (the newest complete one of `run`), "never", or a path to a checkpoint or a run. Raises
    CheckpointError on every rank for a path without a complete checkpoint, or a start that would leave `run` with
    checkpoints of two histories.
    """
    existing = list_checkpoints(groups, run.checkpoints)
    if resume == NO_RESUME:
        together(groups, lambda: _require_empty(run, existing, "--resume never"))
        return None
    if resume == AUTO:
        tag = find_checkpoint(groups, run.checkpoints)
        together(groups, lambda: _require_any(run.checkpoints, tag, required=bool(existing)))
    else:
        tag = _checkpoint_at(groups, Path(resume))
        together(groups, lambda: _require_one_history(run, existing, tag))
    return tag


def manifest_for(run: RunDirectory, tag: Path | None, wanted: RunManifest) -> RunManifest:
    """The manifest this start follows: `wanted` afresh, else the stored one, extended when `wanted` is longer."""
    if tag is None:
        return wanted
    return continue_manifest(_stored_manifest(tag.resolve()), wanted, manifest.tag_step(tag))


def _stored_manifest(tag: Path) -> RunManifest:
    """That of the checkpoint's run, or what the checkpoint says of it where it was copied alone."""
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
        raise CheckpointError(f"--resume: given {looked_for(path)}; no such folder") from None
    except OSError as error:
        raise CheckpointError(f"--resume: given {looked_for(path)}; {str(error.strerror).lower()}") from None
    if not manifest.is_tag(path.name) and (path / manifest.STATE).is_file():
        name = manifest.tag_name(read_state(path).step)
        raise CheckpointError(f"--resume: given {path}, a checkpoint under another name; rename it to {name}")
    if path.is_file() or (path / CONFIG).is_file():
        raise CheckpointError(
            f"--resume: given {path}, a model and no training checkpoint; to start a new run from its weights: "
            f"training.init_from={path}"
        )


def _require_any(folder: Path, tag: Path | None, *, required: bool) -> None:
    if tag is None and required:
        raise CheckpointError(f"{folder}: no complete checkpoint (the warnings above say what is damaged)")


def _require_empty(run: RunDirectory, existing: list[Path], why: str) -> None:
    if existing:
        raise CheckpointError(
            f"{run.checkpoints}: holds {existing[0].name}, which {why} would mix with another history; "
            "give a new --run-dir, or remove that folder"
        )


def _require_one_history(run: RunDirectory, existing: list[Path], tag: Path) -> None:
    if tag.resolve().parent != run.checkpoints.resolve():
        _require_empty(run, existing, f"--resume {tag}")
    elif existing[0].name != tag.name:
        raise CheckpointError(
            f"{tag}: {run.root} also holds {existing[0].name}; to branch off at an earlier step give a new --run-dir"
        )
