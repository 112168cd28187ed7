"""Say which versions and which machine this is: what a report of a fault begins with.

mythos-ds env
mythos-ds env --json
"""

import importlib.metadata
import json
import os
import platform
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import mythos_ds
from mythos_ds.environment import ALLOCATOR_VARIABLES
from mythos_ds.mains import run_tool
from mythos_ds.provenance import git_commit

PACKAGES = (
    "torch", "deepspeed", "megatron-core", "sentencepiece", "pydantic", "numpy", "safetensors", "transformers",
    "flash-attn", "vllm", "tensorboard", "wandb",
)  # fmt: skip
VARIABLES = (
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    *ALLOCATOR_VARIABLES,
    "TORCH_EXTENSIONS_DIR",
)


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true")
    return made


def work(arguments: Namespace) -> None:
    found = describe()
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    width = max(map(len, found))
    sys.stdout.write("".join(f"{name:{width}}  {value}\n" for name, value in found.items()))


def describe() -> dict[str, Any]:
    """What is installed, and on what; a part that cannot be read says why."""
    return {
        "mythos_ds": mythos_ds.__version__,
        "commit": git_commit() or "not in a checkout",
        "folder": str(Path(mythos_ds.__file__).parent),
        "Python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "cores": os.cpu_count(),
        **{name: _version(name) for name in PACKAGES},
        **_part("torch build", _torch),
        **_part("DeepSpeed ops", _operators),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _part(name: str, read: Any) -> dict[str, Any]:
    """What a library says of itself; it may fail in the installation that is to be reported."""
    try:
        found: dict[str, Any] = read()
    except Exception as error:
        return {name: f"not readable: {type(error).__name__}: {error}"}
    return found


def _torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "torch build": f"CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        "GPUs": ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus) or "none",
    }


def _operators() -> dict[str, Any]:
    """DeepSpeed's compiled operators: built before, or to be built when they are needed."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    built = sorted(name for name in ALL_OPS if installed_ops.get(name))
    return {"DeepSpeed ops": ", ".join(built) or f"none built, {len(ALL_OPS)} when needed"}


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
