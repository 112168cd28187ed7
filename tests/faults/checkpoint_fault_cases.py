"""What runs inside the processes of test_checkpoint_faults.py."""

import json
import logging
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mythos_ds.checkpoint import deepspeed_io
from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.load import find_checkpoint, load_checkpoint
from mythos_ds.checkpoint.save import CheckpointWriter, TrainingState, layout_of
from mythos_ds.config.schema import CheckpointConfig
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import MythosError
from mythos_ds.parallel.groups import ParallelGroups
from tests.distributed.cases import LOOPS, opened, own_batches
from tests.distributed.reshard_cases import compare

LARGEST_BYTES = 16_000
"""A file's limit on the rank whose disk is full; the logs and JSON files stay below, DeepSpeed's do not."""


def bad_disks(folder: str) -> dict[str, Any]:
    """Saves of either kind with a bad disk on either rank: one that is full, one that keeps something else."""
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        return {
            f"{fault.__name__} {asynchronous} {rank}": _bad_disk(
                engine, groups, Path(folder) / f"{fault.__name__}{asynchronous}{rank}", asynchronous, rank, fault
            )
            for fault, asynchronous in ((_small_files, False), (_small_files, True), (_other_bits, True))
            for rank in (0, 1)
        }


def _bad_disk(
    engine: TrainingEngine,
    groups: ParallelGroups,
    folder: Path,
    asynchronous: bool,
    rank: int,
    fault: Callable[[], AbstractContextManager[None]],
) -> dict[str, Any]:
    """A save, one in which the disk of `rank` is bad, and one after that is over."""
    writer = CheckpointWriter(engine, groups, folder, CheckpointConfig(keep=9, asynchronous=asynchronous))

    def save(step: int) -> None:
        writer.save(_state(engine, step))
        writer.finish()

    save(1)
    error = None
    with fault() if groups.rank == rank else nullcontext():
        try:
            save(2)
        except MythosError as found:
            error = f"{type(found).__name__}: {found}"
    groups.barrier()
    left = sorted(path.name for path in folder.iterdir())
    groups.barrier()
    save(3)
    return {"error": error, "left": left, "after": [files.tag_step(tag) for tag in files.list_tags(folder)]}


@contextmanager
def _small_files() -> Iterator[None]:
    """The kernel refuses to let files grow, as it does on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _flip(tag: Path) -> str:
    path = max(tag.glob("*optim_states.pt"))
    _flip_bit(path)
    return path.name


def _truncate(tag: Path) -> str:
    path = max(tag.glob("*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def _remove_shard(tag: Path) -> str:
    path = max(tag.glob("*model_states.pt"))
    path.unlink()
    return path.name


def _empty_manifest(tag: Path) -> str:
    (tag / files.MANIFEST).write_text("")
    return files.MANIFEST


def _empty_latest(tag: Path) -> str:
    (tag.parent / files.LATEST).write_text("")
    return files.LATEST


def _remove_latest(tag: Path) -> str:
    (tag.parent / files.LATEST).unlink()
    return files.LATEST


DAMAGES = (_flip, _truncate, _remove_shard, _empty_manifest, _empty_latest, _remove_latest)


def damaged(folder: str) -> dict[str, Any]:
    """Which checkpoint is found after the newest one was damaged, what is said, and whether the former one loads."""
    root, warnings = Path(folder), _Warnings()
    logging.getLogger("mythos_ds").addHandler(warnings)
    results = {}
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        writer = CheckpointWriter(engine, groups, root / "whole", CheckpointConfig())
        losses = []
        for step in range(3):
            losses.append(_step(engine, groups, step))
            if step < 2:
                writer.save(_state(engine, step + 1))
        for damage in DAMAGES:
            copied, name = root / damage.__name__, ""
            if groups.rank == 0:
                shutil.copytree(root / "whole", copied)
                name = damage(copied / files.tag_name(2))
            groups.barrier()
            warnings.texts.clear()
            found = find_checkpoint(groups, copied)
            results[damage.__name__] = {"found": found and found.name, "file": name, "said": list(warnings.texts)}
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        load_checkpoint(engine, groups, root / "_flip" / files.tag_name(1))
        again = [_step(engine, groups, step) for step in (1, 2)]
    return {"results": results, "losses": [losses[1:], again]}


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def payload(folder: str) -> dict[str, Any]:
    """A shard that would execute something, in a checkpoint that verifies: its own layout's load, and another's."""
    root = Path(folder)
    tag, executed = root / files.tag_name(1), root / "executed"
    found: dict[str, Any] = {}
    for name, case in (("same", {"ep": 2, "stage": 3}), ("other", {"ep": 1, "stage": 3})):
        with opened(case) as (engine, groups):
            if name == "same":
                CheckpointWriter(engine, groups, root, CheckpointConfig()).save(_state(engine, 1))
                if groups.rank == 0:
                    _put_payload(tag, executed)
                groups.barrier()
            error = None
            try:
                load_checkpoint(engine, groups, tag)
            except MythosError as refused:
                error = f"{type(refused).__name__}: {refused}"
            before = executed.exists()
            groups.barrier()
        with opened(case) as (engine, groups):
            load_checkpoint(engine, groups, tag, allow_pickle=True)
            groups.barrier()
            after = executed.exists()
            groups.barrier()
            executed.unlink(missing_ok=True)
            groups.barrier()
        found[name] = {"verifies": find_checkpoint(groups, root) == tag, "error": error, "executed": [before, after]}
    return found


def _put_payload(tag: Path, executed: Path) -> None:
    path = max(tag.glob("*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    torch.save({**content, "extra": _Payload(executed)}, path)
    record, manifest = files.digest(path), json.loads((tag / files.MANIFEST).read_text())
    manifest["files"][path.name] = {"size": record.size, "crc32": record.crc32}
    (tag / files.MANIFEST).write_text(json.dumps(manifest))


@contextmanager
def _other_bits() -> Iterator[None]:
    """Every file differs from what was written to it, in one bit."""
    write = deepspeed_io._write

    def changed(path: Path, content: Any) -> files.FileRecord:
        record = write(path, content)
        _flip_bit(path)
        return record

    with patch.object(deepspeed_io, "_write", changed):
        yield


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def beside_training(folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """A save whose writing takes until two steps later, against one that training waited for."""
    root, released = Path(folder), threading.Event()
    write = deepspeed_io._write

    def held_back(path: Path, content: Any) -> Any:
        released.wait()
        return write(path, content)

    with opened(case) as (engine, groups):
        _step(engine, groups, 0)
        CheckpointWriter(engine, groups, root / "waiting", CheckpointConfig()).save(_state(engine, 1))
        writer = CheckpointWriter(engine, groups, root / "beside", CheckpointConfig(asynchronous=True))
        with patch.object(deepspeed_io, "_write", held_back):
            writer.save(_state(engine, 1))
            losses, early = [], []
            for step in (1, 2):
                losses.append(_step(engine, groups, step))
                early.append(writer.advance())
            unpublished = files.list_tags(root / "beside") == []
            groups.barrier()
            released.set()
            writer.save(_state(engine, 3))  # waits for the one before
            times = writer.advance()
            writer.finish()
    with opened(case) as (engine, groups):
        load_checkpoint(engine, groups, root / "beside" / files.tag_name(1))
        again = [_step(engine, groups, step) for step in (1, 2)]
    pair = [root / name / files.tag_name(1) for name in ("waiting", "beside")]
    return {
        "different": compare(*pair),
        "losses": [losses, again],
        "early": early,
        "unpublished": unpublished,
        "times": sorted(times),
        "tags": [files.tag_step(tag) for tag in files.list_tags(root / "beside")],
    }


def _step(engine: TrainingEngine, groups: ParallelGroups, step: int) -> float:
    accumulation = engine.resolved.gradient_accumulation_steps
    batches = own_batches(step, accumulation, groups)
    return engine.train_step(batches, n_loops=LOOPS[step], n_grad_loops=2, lr=3e-3).loss


def _state(engine: TrainingEngine, step: int) -> TrainingState:
    config = engine.resolved.config.model_dump(mode="json")
    return TrainingState(step, 8 * step, None, layout_of(engine.resolved), config)
