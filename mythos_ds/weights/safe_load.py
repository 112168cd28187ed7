"""Reading torch's files without executing what they contain."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from mythos_ds.errors import CheckpointError
from mythos_ds.io import open_regular

_executing = ContextVar("executing", default=False)


def executes_pickles() -> bool:
    """Whether `executing_pickles` allows it now."""
    return _executing.get()


@contextmanager
def executing_pickles(allowed: bool) -> Iterator[None]:
    """Whether files read meanwhile may run code of theirs: --allow-pickle, for files of one's own."""
    token = _executing.set(allowed)
    try:
        yield
    finally:
        _executing.reset(token)


def safe_load(path: Path, *, mapped: bool = True, classes: Sequence[Any] = (), allow_pickle: bool | None = None) -> Any:
    """What torch saved in `path`, on the CPU, tensors mapped into memory or (mapped=False) read.

    Classes are refused, so that nothing in the file is executed, but for `classes` (a class, or what stands for one and
    the name that it has in the file); with `allow_pickle` (None: inside `executing_pickles`) all are taken. Raises
    CheckpointError for what is refused and for damaged files.
    """
    execute = _executing.get() if allow_pickle is None else allow_pickle
    try:
        # torch would wait for good where the file is a named pipe that nobody writes to.
        with open_regular(path), torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not execute)
    except pickle.UnpicklingError as error:
        if "unsupported operand" in str(error).lower():
            raise CheckpointError(f"{path}: damaged, or not a file that torch.save wrote", code="MDS509") from None
        found = str(error).partition("Unsupported global: ")[2].split(" was not")[0] or "other objects"
        raise CheckpointError(
            f"{path}: holds {found} beside tensors and plain values; nothing was executed. If you trust the file: "
            "--allow-pickle",
            code="MDS508",
        ) from None
    except (LookupError, TypeError):
        raise CheckpointError(f"{path}: damaged, or not a file that torch.save wrote", code="MDS509") from None
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: not readable ({error})", code="MDS509") from None
