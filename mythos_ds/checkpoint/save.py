"""Publishing a checkpoint atomically around DeepSpeed's own sharded save.

Everything is written into a hidden directory, forced to disk, read back against the checksums of what was meant to be
written, and only then renamed to `step_<n>`; `latest` is replaced and older checkpoints are removed after that. A stop
at any moment leaves the former checkpoints and at most a hidden left-over.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import manifest, random_state
from mythos_ds.checkpoint.deepspeed_io import Pending, torch_files
from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import CheckpointError, MythosError
from mythos_ds.io import read_json, sync, write_json
from mythos_ds.log import get_logger
from mythos_ds.parallel.collective import on_rank_zero, together
from mythos_ds.parallel.groups import ParallelGroups

_logger = get_logger(__name__)


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
    return tag / f"stage_{groups.layout.stage}" if groups.pipelined else tag


class CheckpointWriter:
    """Saves an engine's state below `directory`, one checkpoint at a time. Every method is collective.

    A save has phases: write the files; the manifest (rank 0); read everything back; publish and remove older ones (rank
    0). One thread of each rank works on them, without collectives; the ranks agree on the end of each phase, and on a
    failure in it, where these methods are called. Asynchronously that is between later steps: training waits for a copy
    in host memory only.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        groups: ParallelGroups,
        directory: Path,
        config: CheckpointConfig,
        on_saved: Callable[[Path], None] = lambda tag: None,
    ):
        """on_saved: called on all ranks, by the thread that calls these methods, when a checkpoint is published."""
        self.engine, self.groups, self.directory, self.config = engine, groups, directory, config
        self._on_saved = on_saved
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._phases: deque[tuple[str, Callable[[], None]]] = deque()
        self._running: Future[None] | None = None
        self._tag = directory
        self._started = self._waited = 0.0
        self._times: dict[str, float] = {}

    def save(self, state: TrainingState) -> Path:
        """Save on all ranks and return the checkpoint's path; a complete one of the same step is left as it is. An
        asynchronous one is published by `advance` or `finish`; one that is still on its way is waited for.

        Raises CheckpointError on all ranks when one cannot write, also for the save before this one.
        """
        if self._running is not None:
            _logger.info("step %d: waiting for checkpoint %s, which is still being written", state.step, self._tag.name)
            self.finish()
        groups, tag = self.groups, self.directory / manifest.tag_name(state.step)
        complete = together(groups, lambda: _is_complete(tag, groups))  # patient: checksums of terabytes
        if not groups.any(not complete):
            return tag
        self._tag, self._started, self._waited = tag, time.monotonic(), 0.0
        partial = _partial(tag)
        on_rank_zero(groups, lambda: _make_room(tag, partial))
        shards = shards_of(partial, groups)
        with torch_files(self.engine.deepspeed).collecting(held=self.config.asynchronous) as pending:
            self.engine.deepspeed.save_checkpoint(
                str(shards.parent), tag=shards.name, client_state={"step": state.step}, save_latest=False
            )
        notes = {random_state_file(groups.rank): random_state.capture(groups.device)}
        if groups.rank == 0:
            content = asdict(state)
            if state.consumed_tokens is None:
                del content["consumed_tokens"]
            notes[manifest.STATE] = content
        self._phases.extend(
            (
                ("written", lambda: _write(partial, groups.rank, pending, notes)),
                ("completed", lambda: _write_manifest(partial, groups)),
                ("read back", lambda: manifest.verify(partial, groups.rank, groups.world_size)),
                ("published", lambda: self._publish(partial, tag)),
            )
        )
        self._start_phase()
        self._waited = time.monotonic() - self._started
        if not self.config.asynchronous:
            self.finish()
        return tag

    def advance(self) -> dict[str, float]:
        """To be called after every step: takes note, without waiting, of what the threads have done meanwhile. Seconds
        of the save that has come to its end, if one has. Raises as `save` does."""
        while self._running is not None and not self.groups.any(not self._running.done()):
            self._end_phase()
        times, self._times = self._times, {}
        return times

    def finish(self) -> None:
        """Wait until nothing is on its way. Raises as `save` does."""
        started = time.monotonic()
        while self._running is not None:
            self._end_phase(waiting_since=started)

    def _start_phase(self) -> None:
        name, work = self._phases.popleft()
        tag = self._tag

        def run() -> None:
            try:
                work()
            except (OSError, MythosError) as error:
                raise CheckpointError(
                    f"checkpoint {tag.name} could not be {name}: {error}; the checkpoints before it are as they were",
                    code="MDS512",
                ) from error

        self._running = self._thread.submit(run)

    def _end_phase(self, waiting_since: float | None = None) -> None:
        """Wait for the running phase on all ranks and start the next one, or say that it was the last."""
        assert self._running is not None
        ended, self._running = self._running, None
        try:
            together(self.groups, ended.result)
        except MythosError:
            self._phases.clear()
            if self.groups.rank == 0:  # a full disk needs the room
                shutil.rmtree(_partial(self._tag), ignore_errors=True)
            raise
        if self._phases:
            self._start_phase()
            return
        now = time.monotonic()
        self._waited += 0.0 if waiting_since is None else now - waiting_since
        self._times = {"checkpoint/stall_seconds": self._waited, "checkpoint/seconds": now - self._started}
        _logger.info("saved checkpoint %s: training stood still for %.2f s of %.2f s", self._tag, *self._times.values())
        self._on_saved(self._tag)

    def _publish(self, partial: Path, tag: Path) -> None:
        if self.groups.rank == 0:
            sync(partial)
            partial.rename(tag)
            manifest.point_latest(self.directory, tag)
            manifest.prune(self.directory, self.config.keep, manifest.tag_step(tag), self.config.keep_every)


def _is_complete(tag: Path, groups: ParallelGroups) -> bool:
    try:
        manifest.verify(tag, groups.rank, groups.world_size)
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
        raise CheckpointError(f"{partial}: cannot be written ({error})", code="MDS512") from error


def random_state_file(rank: int) -> str:
    """Name of the file with the random states of global rank `rank`."""
    return f"random_state_rank_{rank:05d}.json"


def _digest_file(rank: int) -> str:
    return f".digests_rank_{rank:05d}.json"


def _partial(tag: Path) -> Path:
    return tag.with_name(f"{manifest.PARTIAL_PREFIX}{tag.name}")


def _write(partial: Path, rank: int, pending: Pending, notes: dict[str, Any]) -> None:
    """This rank's files, and what they should hold."""
    records = pending.write()
    for name, content in notes.items():
        write_json(partial / name, content)
        records[partial / name] = manifest.digest(partial / name)
    digests = {str(path.relative_to(partial)): asdict(record) for path, record in records.items()}
    write_json(partial / _digest_file(rank), digests)


def _write_manifest(partial: Path, groups: ParallelGroups) -> None:
    if groups.rank != 0:
        return
    digests: dict[str, Any] = {}
    for rank in range(groups.world_size):
        path = partial / _digest_file(rank)
        digests.update(read_json(path, dict[str, dict[str, int]]))
        path.unlink()
    write_json(partial / manifest.MANIFEST, {"format": 1, "files": dict(sorted(digests.items()))})
