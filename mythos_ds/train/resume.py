"""Where a start begins: afresh, from the run directory's newest checkpoint, or from another run's."""

from pathlib import Path

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.load import find_checkpoint, list_checkpoints, verified_everywhere
from mythos_ds.errors import CheckpointError
from mythos_ds.parallel.collective import together
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest, continue_manifest
from mythos_ds.weights.model_folder import CONFIG

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
    origin = RunDirectory(tag.resolve().parent.parent)
    return continue_manifest(origin.read_manifest(), wanted, manifest.tag_step(tag))


def _checkpoint_at(groups: ParallelGroups, path: Path) -> Path:
    together(groups, lambda: _refuse_model(path))
    if manifest.is_tag(path.name):
        tag = path if verified_everywhere(groups, path) else None
    else:
        folder = RunDirectory(path).checkpoints
        tag = find_checkpoint(groups, folder if folder.is_dir() else path)
    together(groups, lambda: _require_any(path, tag, required=True))
    assert tag is not None
    return tag


def _refuse_model(path: Path) -> None:
    """Raises CheckpointError where a path names a model, which training starts from and does not go on with."""
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
