"""Reading torch's files without executing what they contain."""

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from mythos_ds.errors import CheckpointError

ALLOWED = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's files hold beside tensors and plain values."""
_REFUSAL = "holds more than tensors and plain values, not loaded; --allow-pickle executes it"


def require_trusted(path: Path) -> None:
    """Raises CheckpointError where `load_trusted` would refuse what torch saved in `path`. Reads no tensors."""
    try:
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
    if unknown := sorted(named - {f"{kind.__module__}.{kind.__name__}" for kind in ALLOWED}):
        raise CheckpointError(f"{path}: {_REFUSAL} ({unknown[0]})")


def load_trusted(path: Path, *, mapped: bool = True, allow_pickle: bool = False) -> Any:
    """What torch saved in `path`, on the CPU, tensors mapped into memory or (mapped=False) read.

    Classes other than those in ALLOWED are refused, so that nothing in the file is executed, unless `allow_pickle`.
    Raises CheckpointError for those and for damaged files.
    """
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_REFUSAL} ({str(error).splitlines()[0]})") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
