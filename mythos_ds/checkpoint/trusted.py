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


def load_trusted(path: Path) -> Any:
    """What torch saved in `path`, on the CPU, tensors mapped into memory. Classes other than those in ALLOWED are
    refused, so that nothing in the file is executed. Raises CheckpointError for those and for damaged files."""
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors and plain values, not loaded ({error})") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
