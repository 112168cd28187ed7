"""Reading torch's files without executing what they contain."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mythos_ds.errors import CheckpointError

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


@cache
def _allowed() -> list[Any]:
    """What DeepSpeed's files hold beside tensors and plain values. Imported when a file is first read: what converts
    safetensors runs without DeepSpeed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: Any) -> Any:
        """Stands for getattr, by which Python 3.11.0 to 3.11.3 pickle the members of an enum; it gets nothing else."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError("Unsupported global: getattr was not an allowed global")
        return ZeroStageEnum[name]

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]


def load_trusted(path: Path, *, mapped: bool = True, stand_ins: Sequence[Any] = ()) -> Any:
    """What torch saved in `path`, on the CPU, tensors mapped into memory or (mapped=False) read.

    Classes are refused, so that nothing in the file is executed, but for DeepSpeed's own few and names that have one of
    the `stand_ins` (class, name in the file); inside `executing_pickles` all are taken. Raises CheckpointError for
    what is refused and for damaged files.
    """
    allowed = [*_allowed(), *stand_ins]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not _executing.get())
    except pickle.UnpicklingError as error:
        if "unsupported operand" in str(error).lower():
            raise CheckpointError(f"{path}: damaged, or not a file that torch.save wrote") from None
        found = str(error).partition("Unsupported global: ")[2].split(" was not")[0] or "other objects"
        raise CheckpointError(
            f"{path}: holds {found} beside tensors and plain values; nothing was executed. If you trust the file: "
            "--allow-pickle"
        ) from None
    except (LookupError, TypeError):
        raise CheckpointError(f"{path}: damaged, or not a file that torch.save wrote") from None
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
