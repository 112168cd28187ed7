"""Peak memory of the calling process."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Peak bytes since the start: allocated on the GPU where there is one, else resident in host memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
