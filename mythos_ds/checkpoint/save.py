"""Publishing a checkpoint atomically around DeepSpeed's own sharded save.

Everything is written into a hidden directory, checksummed and forced to disk, and only then renamed to `step_<n>`;
`latest` is replaced after that. A stop at any moment leaves the former checkpoints and at most a hidden left-over.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import files, random_state
from mythos_ds.checkpoint.agreement import on_rank_zero
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.durable import sync
from mythos_ds.engine.engine import TrainingEngine
from mythos_ds.errors import CheckpointError
from mythos_ds.log import get_logger
from mythos_ds.parallel.groups import ParallelGroups

# DeepSpeed puts these beside the checkpoints; they refuse to merge expert-parallel ones.
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")

_logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds beside the engine's tensors (weights, optimizer state and router buffers).

    `layout` are the facts that must be equal for DeepSpeed's files to fit; `consumed_samples` counts sequences;
    `first_validation_loss` is that of the untrained model, in nats per token.
    """

    step: int
    consumed_samples: int
    first_validation_loss: float | None
    layout: dict[str, Any]
    config: dict[str, Any]


def layout_of(resolved: ResolvedRun) -> dict[str, Any]:
    """What DeepSpeed's sharded files depend on."""
    return {
        "world_size": resolved.world_size,
        "ep_size": resolved.ep_size,
        "zero_stage": resolved.config.parallel.zero_stage,
        "pp_size": resolved.config.parallel.pp_size,
    }


def shards_of(tag: Path, groups: ParallelGroups) -> Path:
    """Where DeepSpeed's files of the calling process are: `tag`, or a folder of the pipeline stage in it, because the
    stages' files have the same names."""
    return tag / f"stage_{groups.stage}" if groups.pipelined else tag


def save_checkpoint(
    engine: TrainingEngine, groups: ParallelGroups, directory: Path, state: TrainingState, *, keep: int
) -> Path:
    """Save on all ranks and return the checkpoint's path; a complete one of the same step is left as it is.

    The newest `keep` checkpoints stay. Raises CheckpointError when `directory` cannot be written.
    """
    tag = directory / files.tag_name(state.step)
    partial = directory / f"{files.PARTIAL_PREFIX}{tag.name}"
    if not groups.any(not _is_complete(tag, groups)):
        return tag
    on_rank_zero(groups, lambda: _make_room(tag, partial))
    shards = shards_of(partial, groups)
    engine.deepspeed.save_checkpoint(
        str(shards.parent), tag=shards.name, client_state={"step": state.step}, save_latest=False
    )
    groups.barrier()
    files.write_json(partial / random_state_file(groups.rank), random_state.capture(groups.device))
    if groups.rank == 0:
        files.write_json(partial / files.STATE, asdict(state))
        for name in _RECOVERY_SCRIPTS:
            (shards.parent / name).unlink(missing_ok=True)
    groups.barrier()
    _write_digests(partial, groups)
    groups.barrier()
    if groups.rank == 0:
        _publish(partial, tag, groups.world_size)
        files.prune(directory, keep, state.step)
    groups.barrier()
    _logger.info("saved checkpoint %s", tag)
    return tag


def _is_complete(tag: Path, groups: ParallelGroups) -> bool:
    try:
        files.verify(tag, groups.rank, groups.world_size)
    except CheckpointError:
        return False
    return True


def _make_room(tag: Path, partial: Path) -> None:
    try:
        for leftover in (tag, partial):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be written ({error})") from error


def random_state_file(rank: int) -> str:
    """Name of the file with the random states of global rank `rank`."""
    return f"random_state_rank_{rank:05d}.json"


def _digest_file(rank: int) -> str:
    return f".digests_rank_{rank:05d}.json"


def _write_digests(partial: Path, groups: ParallelGroups) -> None:
    """Force this rank's share of the files to disk and note their sizes and checksums."""
    digests = {}
    for path in files.share_of(files.data_files(partial), groups.rank, groups.world_size):
        sync(path)
        digests[str(path.relative_to(partial))] = asdict(files.digest(path))
    files.write_json(partial / _digest_file(groups.rank), digests)


def _publish(partial: Path, tag: Path, world_size: int) -> None:
    digests: dict[str, Any] = {}
    for rank in range(world_size):
        path = partial / _digest_file(rank)
        digests.update(files.read_json(path))
        path.unlink()
    files.write_json(partial / files.MANIFEST, {"format": 1, "files": dict(sorted(digests.items()))})
    sync(partial)
    partial.rename(tag)
    files.point_latest(tag.parent, tag)
