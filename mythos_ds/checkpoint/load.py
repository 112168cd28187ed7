"""Finding the newest checkpoint that every rank can verify, and resuming from it."""

from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import files, random_state
from mythos_ds.checkpoint.agreement import together
from mythos_ds.checkpoint.reshard import load_resharded
from mythos_ds.checkpoint.save import TrainingState, layout_of, random_state_file, shards_of
from mythos_ds.checkpoint.torch_files import torch_files
from mythos_ds.checkpoint.trusted import require_trusted
from mythos_ds.engine.engine import TrainingEngine
from mythos_ds.errors import CheckpointError
from mythos_ds.log import get_logger
from mythos_ds.parallel.groups import ParallelGroups

_logger = get_logger(__name__)


def find_checkpoint(groups: ParallelGroups, directory: Path) -> Path | None:
    """The newest checkpoint below `directory` that is complete for all ranks; damaged ones are skipped aloud. Rank 0
    says which there are, so that ranks with other disks cannot disagree."""
    steps = groups.from_rank_zero([files.tag_step(tag) for tag in files.list_tags(directory)])
    for step in steps:
        tag = directory / files.tag_name(step)
        if verified_everywhere(groups, tag):
            return tag
    return None


def verified_everywhere(groups: ParallelGroups, tag: Path) -> bool:
    """Whether all ranks find `tag` complete. The ranks share the work of reading the checksums."""
    fault: CheckpointError | None = None
    try:
        files.verify(tag, groups.rank, groups.world_size)
    except CheckpointError as error:
        fault = error
        _logger.warning("skipping checkpoint %s: %s", tag.name, error)
    return not groups.any(fault is not None)


def read_state(tag: Path) -> TrainingState:
    """Step, position and layout of a checkpoint, without its tensors. Raises CheckpointError when it is damaged."""
    content = files.read_json(tag / files.STATE)
    try:
        return TrainingState(**content)
    except TypeError as error:
        raise CheckpointError(f"{tag / files.STATE}: not a training state ({error})") from error


def load_checkpoint(
    engine: TrainingEngine, groups: ParallelGroups, tag: Path, *, allow_pickle: bool = False
) -> TrainingState:
    """Bring a freshly built engine and this process's random states to where `tag` was saved, by any layout.

    Nothing in the files is executed unless `allow_pickle`. Raises CheckpointError when DeepSpeed's files and the
    training state disagree, are of another model, or hold more than tensors and plain values.
    """
    state = read_state(tag)
    if not allow_pickle:
        # Before DeepSpeed's loads, whose ranks wait for each other.
        own = files.share_of(sorted(tag.rglob("*.pt")), groups.rank, groups.world_size)
        together(groups, lambda: _require_all_trusted(own))
    layout = layout_of(engine.resolved)
    if {"pp_size": 1, **state.layout} != layout:
        _logger.info("%s was written by the layout %s; resharding to %s", tag.name, state.layout, layout)
        load_resharded(engine, groups, tag, state.step)
        _restore_random_states(tag, groups, state)
        return state
    shards = shards_of(tag, groups)
    torch_files(engine.deepspeed).allow_pickle = allow_pickle
    path, client_state = engine.deepspeed.load_checkpoint(str(shards.parent), tag=shards.name)
    saved: dict[str, Any] = client_state or {}
    if path is None or saved.get("step") != state.step:
        raise CheckpointError(f"{tag}: the model files are of step {saved.get('step')}, expected {state.step}")
    _restore_random_states(tag, groups, state)
    _logger.info("resumed from %s", tag)
    return state


def _require_all_trusted(paths: list[Path]) -> None:
    for path in paths:
        require_trusted(path)


def _restore_random_states(tag: Path, groups: ParallelGroups, state: TrainingState) -> None:
    """Those of this rank; a rank that the checkpoint does not know starts from the run's seed."""
    path = tag / random_state_file(groups.rank)
    if path.is_file():
        random_state.restore(files.read_json(path), groups.device)
    else:
        random_state.seed((state.config["training"]["seed"], state.step, groups.rank))
