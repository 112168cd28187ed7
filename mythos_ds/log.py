"""Logging that knows ranks: rank 0 speaks, the others only warn."""

import logging
import sys

_ROOT = "mythos_ds"


def get_logger(name: str) -> logging.Logger:
    """The package's logger for module `name`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure(rank: int) -> None:
    """Sends the package's messages to stderr: info and up on rank 0, warnings elsewhere. Repeatable."""
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s rank {rank}] %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
