"""What DeepSpeed writes and reads its files through: checksummed on the way, held in host memory where asked, and
never executed.

A save of DeepSpeed is collective, so that a rank whose disk is full must not raise inside of it: the others would wait.
"""

import copy
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from mythos_ds.checkpoint.deepspeed_format import load_deepspeed_file
from mythos_ds.checkpoint.manifest import FileRecord


class HashedFile:
    """A new file for torch.save, with the size and CRC-32 of what was meant to be in it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self.size, self.crc32 = 0, 0
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`. Keeps the OSError that it raises: torch replaces it by one of its own."""
        rest = memoryview(data).cast("B")
        self.size, self.crc32 = self.size + len(rest), zlib.crc32(rest, self.crc32)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.fault = error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self, *, durable: bool) -> None:
        """Forced to the disk first where `durable`, and out of memory, so that reading it back reads the disk."""
        try:
            if durable:
                os.fsync(self._file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self._file.close()


def _write(path: Path, content: Any) -> FileRecord:
    """torch.save, durable. Raises OSError where the disk does not take it."""
    file = HashedFile(path)
    try:
        torch.save(content, file)  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:
        file.close(durable=False)
        raise file.fault or error from None
    file.close(durable=True)
    return FileRecord(file.size, file.crc32)


class Pending:
    """The files of one save. held: copied to host memory now and written by `write`; else written as they come."""

    def __init__(self, *, held: bool):
        self.held = held
        self._records: dict[Path, FileRecord] = {}
        self._contents: list[tuple[Path, Any]] = []
        self._failure: OSError | None = None

    def add(self, path: Path, content: Any) -> None:
        """Write the file, or keep a copy of `content`. A failure is told by `write`."""
        if self.held:
            self._contents.append((path, to_host(content, {})))
        elif self._failure is None:
            try:
                self._records[path] = _write(path, content)
            except OSError as error:
                self._failure = _named(error, path)

    def write(self) -> dict[Path, FileRecord]:
        """Write what is held, and forget it; sizes and checksums of all files. Raises OSError with the file's name."""
        while self._contents and self._failure is None:
            path, content = self._contents.pop(0)
            try:
                self._records[path] = _write(path, content)
            except OSError as error:
                self._failure = _named(error, path)
            del content
        if self._failure is not None:
            self._contents.clear()
            raise self._failure
        return self._records


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))


class TorchFiles(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, saving through a `Pending` and loading through `safe_load`."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: Pending | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write or hold the file."""
        assert self._pending is not None, "saves go through CheckpointWriter"
        self._pending.add(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The file's content on the CPU. Raises CheckpointError where it holds more than it should."""
        # Not mapped: optimizers keep what they are given, and the file may be removed during the run.
        return load_deepspeed_file(Path(path), mapped=False)

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed must copy tensors out of larger ones; what is held has been copied so."""
        return self._pending is None or not self._pending.held

    @contextmanager
    def collecting(self, *, held: bool) -> Iterator[Pending]:
        """What DeepSpeed saves meanwhile."""
        self._pending = Pending(held=held)
        try:
            yield self._pending
        finally:
            self._pending = None


def torch_files(engine: Any) -> TorchFiles:
    """Those of a DeepSpeed engine, put in at the first call."""
    if not isinstance(engine.checkpoint_engine, TorchFiles):
        engine.checkpoint_engine = TorchFiles()
        # Rank 0 would put scripts beside the checkpoints that refuse expert-parallel ones, and could fail in it alone.
        engine._copy_recovery_script = lambda save_path: None
    return engine.checkpoint_engine


def to_host(value: Any, copies: dict[tuple, Tensor]) -> Any:
    """A copy of a nested value that shares nothing with it, tensors on the CPU.

    Tensors that are the same memory stay one (`copies`, empty at first): tied weights are recognised by that.
    """
    if isinstance(value, Tensor):
        where = value.untyped_storage().data_ptr(), value.storage_offset(), value.device
        key = (*where, value.dtype, value.shape, value.stride())
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        copied = copy.copy(value)
        for name, item in value.items():
            copied[name] = to_host(item, copies)
        return copied
    if isinstance(value, list):
        return [to_host(item, copies) for item in value]
    if type(value) is tuple:
        return tuple(to_host(item, copies) for item in value)
    return copy.deepcopy(value)
