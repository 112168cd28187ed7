"""What a study ran on, in words for its page."""

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Processor or GPU, and the versions that matter."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{os.cpu_count()} cores of {_processor()}, no GPU"
    return f"{machine}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
