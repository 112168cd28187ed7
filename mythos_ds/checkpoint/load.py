"""Finding the newest checkpoint that every rank can verify, and resuming from it."""

from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import manifest, random_state
from mythos_ds.checkpoint.changed_defaults import gradient_types_note
from mythos_ds.checkpoint.deepspeed_format import load_deepspeed_file
from mythos_ds.checkpoint.deepspeed_io import torch_files
from mythos_ds.checkpoint.reshard import load_resharded
from mythos_ds.checkpoint.save import layout_of, random_state_file, shards_of
from mythos_ds.checkpoint.training_state import TrainingState, read_state
from mythos_ds.engine.optimizer import keeping_settings
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import CheckpointError, DamagedCheckpointError, RankError, ReportedElsewhere
from mythos_ds.log import get_logger
from mythos_ds.parallel.collective import together
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.weights.safe_load import executing_pickles

_logger = get_logger(__name__)


def list_checkpoints(groups: ParallelGroups, directory: Path) -> list[Path]:
    """Published checkpoints, newest first, as rank 0 sees them: ranks with other disks cannot disagree on the order."""
    steps = [manifest.tag_step(tag) for tag in manifest.list_tags(directory)] if groups.rank == 0 else []
    return [directory / manifest.tag_name(step) for step in groups.from_rank_zero(steps)]


def find_checkpoint(groups: ParallelGroups, directory: Path) -> Path | None:
    """Finds the newest checkpoint in `directory` that is complete for all ranks; skips damaged ones with a warning."""
    tags = list_checkpoints(groups, directory)
    if tags and groups.rank == 0 and (named := manifest.read_latest(directory)) != tags[0].name:
        _logger.warning("%s says %s; the newest checkpoint is %s", directory / manifest.LATEST, named, tags[0].name)
    return next((tag for tag in tags if verified_everywhere(groups, tag)), None)


def newest_whole(directory: Path, *, checksums: bool = True) -> Path | None:
    """As `find_checkpoint`, for one process without groups; by sizes alone without `checksums`."""
    for tag in manifest.list_tags(directory):
        try:
            manifest.verify(tag, 0, 1, checksums=checksums)
        except CheckpointError as error:
            _logger.warning("skipping checkpoint %s: %s", tag.name, error)
        else:
            return tag
    return None


def verified_everywhere(groups: ParallelGroups, tag: Path) -> bool:
    """Whether all ranks find `tag` complete. The ranks share the work of reading the checksums."""
    try:
        together(groups, lambda: manifest.verify(tag, groups.rank, groups.world_size))
    except ReportedElsewhere:
        return False
    except RankError as error:
        _logger.warning("skipping checkpoint %s: %s", tag.name, error)
        return False
    return True


def load_checkpoint(
    engine: TrainingEngine, groups: ParallelGroups, tag: Path, *, allow_pickle: bool = False
) -> TrainingState:
    """Bring a freshly built engine and this process's random states to where `tag` was saved, by any layout.

    Nothing in the files is executed unless `allow_pickle`. Raises CheckpointError when DeepSpeed's files and the
    training state disagree, are of another model, or hold more than tensors and plain values.
    """
    state = read_state(tag)
    layout = layout_of(engine.resolved)
    same = {"pp_size": 1, **state.layout} == layout
    if not same:
        _logger.info("%s was written by the layout %s; resharding to %s", tag.name, state.layout, layout)
    if changed := _changed(state, engine):
        same = False
        _logger.info("%s is of another training stage: %s", tag.name, ", ".join(changed))
    if groups.rank == 0 and (note := gradient_types_note(state, engine.resolved.config)) is not None:
        _logger.warning("%s: %s", tag.name, note)
    if not allow_pickle:
        together(groups, lambda: _require_safe(tag, groups))
    with executing_pickles(allow_pickle), keeping_settings(engine.deepspeed.optimizer):
        if same:
            _load_shards(engine, groups, tag, state.step)
        else:
            load_resharded(engine, groups, tag, state.step)
    together(groups, lambda: _restore_random_states(tag, groups, state))
    _logger.info("resumed from %s", tag)
    return state


def _changed(state: TrainingState, engine: TrainingEngine) -> list[str]:
    """Settings that DeepSpeed's files depend on, where a training stage has others than the one before it."""
    config = engine.resolved.config
    before, now = state.config["training"], config.training
    values = {
        "dtype": (before.get("dtype", now.dtype), now.dtype),
        "frozen": (before.get("frozen") or [], now.frozen),
        "injection_lr": (before.get("injection_lr") is not None, now.injection_lr is not None),
        "max_loops": (state.config["model"].get("max_loops"), config.model.max_loops),
    }
    return [f"{name} {old} -> {new}" for name, (old, new) in values.items() if old != new]


def _require_safe(tag: Path, groups: ParallelGroups) -> None:
    """Every file once, by one of the ranks, without its tensors: inside DeepSpeed's load a rank cannot fail alone."""
    for path in manifest.share_of(sorted(tag.rglob("*.pt")), groups.rank, groups.world_size):
        load_deepspeed_file(path)


def _load_shards(engine: TrainingEngine, groups: ParallelGroups, tag: Path, step: int) -> None:
    shards = shards_of(tag, groups)
    torch_files(engine.deepspeed)
    path, client_state = engine.deepspeed.load_checkpoint(str(shards.parent), tag=shards.name)
    saved: dict[str, Any] = client_state or {}
    if path is None or saved.get("step") != step:
        raise DamagedCheckpointError(f"{tag}: the model files are of step {saved.get('step')}, expected {step}")


def _restore_random_states(tag: Path, groups: ParallelGroups, state: TrainingState) -> None:
    """Those of this rank; a rank that the checkpoint does not know starts from the run's seed."""
    path = tag / random_state_file(groups.rank)
    if path.is_file():
        random_state.restore(path, groups.device)
    else:
        random_state.seed((state.config["training"]["seed"], state.step, groups.rank))
