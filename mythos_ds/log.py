"""Logging that knows ranks: rank 0 speaks, the others only warn."""

import logging
import sys
from pathlib import Path

_ROOT = "mythos_ds"
_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def get_logger(name: str) -> logging.Logger:
    """The package's logger for module `name`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def quiet_without_gpu() -> None:
    """Leave out that DeepSpeed takes the CPU, on a machine without a GPU; before it is imported."""
    if not any(Path(device).exists() for device in _DEVICES):
        logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def configure(rank: int) -> None:
    """Sends the package's messages to stderr: info and up on rank 0, warnings elsewhere. Repeatable."""
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s rank {rank}] %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
