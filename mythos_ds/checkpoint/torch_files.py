"""What DeepSpeed writes and reads its files through: held in host memory where asked, and never executed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from mythos_ds.checkpoint.trusted import load_trusted
from mythos_ds.errors import CheckpointError


class Pending:
    """The files of a save. Held: with their contents as they were when DeepSpeed handed them over, for writing later.
    Else written at once; a failure is kept until `write`, because DeepSpeed's own ranks wait for each other."""

    def __init__(self, *, held: bool):
        self.held = held
        self.paths: list[Path] = []
        self._contents: list[tuple[Path, Any]] = []
        self._failure: OSError | RuntimeError | None = None

    def add(self, path: Path, content: Any) -> None:
        """Write the file, or keep a copy of `content` in host memory."""
        self.paths.append(path)
        if self.held:
            self._contents.append((path, to_host(content)))
            return
        try:
            _write(path, content)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter, for a full disk too
            self._failure = self._failure or error

    def write(self) -> None:
        """Write what is held, and forget it. Raises CheckpointError where a file cannot be written."""
        try:
            while self._contents:
                path, content = self._contents.pop(0)
                _write(path, content)
            if self._failure is not None:
                raise self._failure
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.paths[0].parent}: cannot be written ({error})") from error


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


class TorchFiles(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, with loads that execute nothing unless `allow_pickle`."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_pickle = False
        self._pending: Pending | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write or hold the file."""
        assert self._pending is not None, "saves go through CheckpointWriter"
        self._pending.add(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The file's content on the CPU. Raises CheckpointError where it holds more than it should."""
        return load_trusted(Path(path), mapped=False, allow_pickle=self.allow_pickle)

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
    return engine.checkpoint_engine


def to_host(value: Any) -> Any:
    """A copy that shares nothing with `value`, tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = to_host(item)
        return copied
    if isinstance(value, list):
        return [to_host(item) for item in value]
    if type(value) is tuple:
        return tuple(to_host(item) for item in value)
    return copy.deepcopy(value)
