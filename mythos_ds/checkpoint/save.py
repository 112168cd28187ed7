"""Publishing a checkpoint atomically around DeepSpeed's own sharded save.

Everything is written into a hidden directory, checksummed and forced to disk, and only then renamed to `step_<n>`;
`latest` is replaced after that. A stop at any moment leaves the former checkpoints and at most a hidden left-over.

Asynchronously, the step waits for a copy in host memory only; a thread of each rank writes it, and rank 0's publishes
when all ranks' checksums are there. The threads use no collectives: they meet in the directory.
"""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import files, random_state
from mythos_ds.checkpoint.agreement import on_rank_zero, together
from mythos_ds.checkpoint.torch_files import torch_files
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.durable import sync
from mythos_ds.engine.engine import TrainingEngine
from mythos_ds.errors import CheckpointError
from mythos_ds.log import get_logger
from mythos_ds.parallel.groups import ParallelGroups

# DeepSpeed puts these beside the checkpoints; they refuse to merge expert-parallel ones.
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")

_FAILED = ".failed_rank_"
_THREADS = 4
"""Files that a rank checksums at once."""
_POLL_S = 0.05

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


class CheckpointWriter:
    """Saves an engine's state below `directory`. Every method is collective."""

    def __init__(self, engine: TrainingEngine, groups: ParallelGroups, directory: Path, config: CheckpointConfig):
        self.engine, self.groups, self.directory, self.config = engine, groups, directory, config
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, state: TrainingState) -> Path:
        """Save on all ranks and return the checkpoint's path; a complete one of the same step is left as it is. An
        asynchronous one is published later: see `finish`. Raises CheckpointError when the directory cannot be
        written, also for the save before this one where that was asynchronous."""
        self.finish()
        groups, tag = self.groups, self.directory / files.tag_name(state.step)
        partial = self.directory / f"{files.PARTIAL_PREFIX}{tag.name}"
        if not groups.any(not _is_complete(tag, groups)):
            return tag
        on_rank_zero(groups, lambda: _make_room(tag, partial))
        started = time.monotonic()
        shards = shards_of(partial, groups)
        with torch_files(self.engine.deepspeed).collecting(held=self.config.asynchronous) as pending:
            self.engine.deepspeed.save_checkpoint(
                str(shards.parent), tag=shards.name, client_state={"step": state.step}, save_latest=False
            )
        generators = random_state.capture(groups.device)
        groups.barrier()
        if groups.rank == 0:
            for name in _RECOVERY_SCRIPTS:
                (shards.parent / name).unlink(missing_ok=True)
        stall = time.monotonic() - started

        def write() -> None:
            pending.write()
            own = [*pending.paths, partial / random_state_file(groups.rank)]
            files.write_json(own[-1], generators)
            if groups.rank == 0:
                own.append(partial / files.STATE)
                files.write_json(own[-1], asdict(state))
            _write_digests(partial, groups.rank, own)

        if self.config.asynchronous:
            arguments = (write, partial, tag, stall)
            self._thread = threading.Thread(target=self._in_background, args=arguments, name="checkpoint")
            self._thread.start()
            return tag
        together(groups, write)
        on_rank_zero(groups, lambda: _publish(partial, tag, groups.world_size))
        whole = not groups.any(not _is_complete(tag, groups))
        on_rank_zero(groups, lambda: self._prune(state.step, whole))
        _logger.info("saved checkpoint %s", tag)
        return tag

    def finish(self) -> None:
        """Wait for an asynchronous save. Raises CheckpointError on every rank where it failed on one."""
        if not self.config.asynchronous:
            return
        if self._thread is not None:
            if self._thread.is_alive():
                _logger.info("waiting for the checkpoint that is being written")
            self._thread.join()
            self._thread = None
        together(self.groups, self._raise_failure)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(f"{self.directory}: the checkpoint was not written ({failure})") from failure

    def _in_background(self, write: Any, partial: Path, tag: Path, stall: float) -> None:
        started = time.monotonic()
        try:
            write()
            if self.groups.rank == 0:
                _await_digests(partial, self.groups.world_size, self.engine.resolved.config.parallel.timeout_s)
                _publish(partial, tag, self.groups.world_size)
                self._prune(files.tag_step(tag), _is_complete(tag, self.groups))
        except Exception as error:
            self._failure = error
            _leave_mark(partial, self.groups.rank, error)
            return
        seconds = time.monotonic() - started
        _logger.info("saved checkpoint %s: training stood for %.2f s, written in %.1f s", tag, stall, seconds)

    def _prune(self, newest: int, whole: bool) -> None:
        """Older checkpoints go only when the new one was read back and is as it should be."""
        if not whole:
            raise CheckpointError(f"{self.directory / files.tag_name(newest)}: does not verify after it was written")
        files.prune(self.directory, self.config.keep, newest, self.config.keep_every)


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


def _write_digests(partial: Path, rank: int, own: list[Path]) -> None:
    """Force this rank's files to disk, read them back, and note their sizes and checksums."""

    def check(path: Path) -> tuple[str, dict[str, int]]:
        sync(path)
        return str(path.relative_to(partial)), asdict(files.digest(path))

    with ThreadPoolExecutor(_THREADS) as pool:
        files.write_json(partial / _digest_file(rank), dict(pool.map(check, own)))


def _await_digests(partial: Path, world_size: int, timeout_s: float) -> None:
    """Until every rank has written. Raises CheckpointError where one failed or does not come to an end."""
    deadline = time.monotonic() + timeout_s
    while True:
        if marks := sorted(partial.glob(f"{_FAILED}*")):
            raise CheckpointError(f"rank {int(marks[0].name.removeprefix(_FAILED))}: {marks[0].read_text()}")
        missing = [rank for rank in range(world_size) if not (partial / _digest_file(rank)).is_file()]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(f"rank {missing[0]} has not written its files after {timeout_s} s")
        time.sleep(_POLL_S)


def _leave_mark(partial: Path, rank: int, error: Exception) -> None:
    """Tell rank 0's thread; where even that cannot be written, its time limit does."""
    try:
        (partial / f"{_FAILED}{rank}").write_text(str(error))
    except OSError:
        _logger.error("rank %d: the checkpoint was not written: %s", rank, error)


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
