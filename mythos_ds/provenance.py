"""Where numbers come from: commit, package versions, machine."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import mythos_ds

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece", "pydantic")


def describe(gpu: str | None) -> str:
    """The GPU of that name, or the processor where there is none, and the versions that matter."""
    machine = gpu or f"{os.cpu_count()} cores of {_processor()}, no GPU"
    return f"{machine}; torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `+changes` when it has some; None outside of git."""
    folder = Path(__file__).resolve().parent
    try:
        # An environment inside another project's repository is not a checkout of this one.
        _git(folder, "ls-files", "--error-unmatch", "provenance.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def last_names(value: Any) -> Any:
    """JSON values with the last name of every path in them: a model that is handed on tells nothing of the disk that it
    was trained on."""
    if isinstance(value, dict):
        return {key: last_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [last_names(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.sep in value else value


def package_versions() -> dict[str, str | None]:
    """Installed versions of what determines the numbers of a run."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "mythos_ds": mythos_ds.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
