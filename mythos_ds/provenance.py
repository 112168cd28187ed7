"""What a study ran on, in words for its page."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe(gpu: str | None) -> str:
    """The GPU of that name, or the processor where there is none, and the versions that matter."""
    machine = gpu or f"{os.cpu_count()} cores of {_processor()}, no GPU"
    return f"{machine}; torch {version('torch')}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
