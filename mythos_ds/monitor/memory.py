"""Peak memory of the calling process."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Peak bytes since the start: allocated on the GPU where there is one, else resident in host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start at the parent's size: it survives exec
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
