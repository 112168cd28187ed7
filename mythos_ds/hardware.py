"""What a GPU holds and moves. Peak rates are those of the makers' data sheets; what is an assumption says so."""

import os
import resource
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.io import read_json

_LARGEST = 1e30


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node. Bandwidths are bytes per second, per GPU and direction.

    Attributes:
        memory_bytes: of the device.
        peak_flops: dense bf16.
        kernel_share: share of the peak that large matrix products reach (assumption; an H200 was seen at 0.8).
        memory_bandwidth: of the device's own memory, read and written together.
        memory_share: share of it that operations reach which do no matrix products (assumption: an H200's copies reach
            0.9, elementwise operations 80 % of that).
        launch_s: seconds of the host to launch an operation from PyTorch, nothing compiled (assumption).
        node_bandwidth: to the other GPUs of the node.
        network_bandwidth: to other nodes.
        host_bandwidth: to the node's own memory (PCIe 5 x16, less overhead; assumption).
        gpus_per_node: GPUs that share a node.
        price_per_hour: in dollars (assumption).
        disk_bandwidth: of a node to its file system (assumption).
        failures_per_hour: of a GPU with all that belongs to it (Llama 3, arXiv 2407.21783: 419 in 54 days of 16,384).
    """

    name: str
    memory_bytes: float
    peak_flops: float
    kernel_share: float
    node_bandwidth: float
    network_bandwidth: float
    memory_bandwidth: float
    memory_share: float = 0.7
    launch_s: float = 5e-6
    host_bandwidth: float = 50e9
    gpus_per_node: int = 8
    price_per_hour: float = 2.5
    disk_bandwidth: float = 2e9
    failures_per_hour: float = 1.97e-5


PEAK_BF16 = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "A10": 1.25e14,
    "MI300X": 1.307e15,
    "MI250X": 1.915e14,
}
"""Dense bf16 peaks in FLOP/s from the vendors' data sheets (no sparsity), by a part of the device's name."""

GPUS = {
    "h100": Gpu("h100", 80e9, PEAK_BF16["H100"], 0.75, 450e9, 50e9, memory_bandwidth=3.35e12, price_per_hour=2.5),
    "h200": Gpu("h200", 141e9, PEAK_BF16["H200"], 0.75, 450e9, 50e9, memory_bandwidth=4.8e12, price_per_hour=3.0),
    "b200": Gpu("b200", 180e9, PEAK_BF16["B200"], 0.7, 900e9, 50e9, memory_bandwidth=8e12, price_per_hour=5.0),
    "mi300x": Gpu("mi300x", 192e9, PEAK_BF16["MI300X"], 0.6, 448e9, 50e9, memory_bandwidth=5.3e12, price_per_hour=2.5),
}

PADS_GROUPS = ("b200",)
"""GPUs whose grouped products take groups of whole 16 bytes only, so that rows are copied (kernels/grouped_mlp.py)."""


def peak_bf16(device_name: str) -> float | None:
    """The dense bf16 peak of a device by the name that its driver gives it; None where it is not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)


def read_gpu(name: str) -> Gpu:
    """A GPU by name, or from a JSON file with the fields of `Gpu`. Raises ConfigError for anything else."""
    if name in GPUS:
        return GPUS[name]
    if not name.endswith(".json"):
        raise OptionError(f"--gpu: given {name}; allowed: {', '.join(GPUS)}, or a JSON file")
    try:
        content = read_json(Path(name), dict[str, Any], ConfigError)
    except ConfigError as error:
        raise OptionError(f"--gpu: {error}") from None
    known = {field.name: field for field in fields(Gpu)}
    if unknown := sorted(set(content) - set(known)):
        raise OptionError(f"--gpu: {name}: unknown {unknown[0]!r}; allowed: {', '.join(known)}")
    needed = [field.name for field in known.values() if field.default is MISSING]
    if missing := [field for field in needed if field not in content]:
        raise OptionError(f"--gpu: {name}: missing {', '.join(missing)}; required: {', '.join(needed)}")
    made = Gpu(**content)
    if not isinstance(made.name, str) or not made.name:
        raise OptionError(f"--gpu: {name}: name: given {made.name!r}; allowed: a text")
    numbers = {field: getattr(made, field) for field in known if field != "name"}
    for field, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            raise OptionError(f"--gpu: {name}: {field}: given {value!r}; allowed: 0 < number <= {_LARGEST:g}")
    if not isinstance(made.gpus_per_node, int):
        raise OptionError(f"--gpu: {name}: gpus_per_node: given {made.gpus_per_node}; allowed: a whole number")
    for share in ("kernel_share", "memory_share"):
        if numbers[share] > 1:
            raise OptionError(f"--gpu: {name}: {share}: given {numbers[share]}; allowed: at most 1")
    return made


def compiler_problem(environ: Mapping[str, str]) -> str | None:
    """What is missing for an optimizer that is offloaded from an NVIDIA GPU, whose operator DeepSpeed compiles at the
    first start; None where nothing is. nvcc is looked for where torch's builds look."""
    spec = find_spec("deepspeed")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if any(list(Path(folder, "ops", "adam").glob("cpu_adam_op*.so")) for folder in folders):
        return None
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=environ.get("PATH", ""))
    nvcc = Path(home, "bin", "nvcc") if home else Path(found or "/usr/local/cuda/bin/nvcc")
    if os.access(nvcc, os.X_OK):
        return None
    return (
        'parallel.offload_optimizer: "cpu" given; on a GPU DeepSpeed compiles its CPU Adam at the first start, which '
        f"needs CUDA's compiler, and there is no {nvcc}; allowed: CUDA_HOME = the folder of a CUDA toolkit of torch's "
        'CUDA version, or "none"'
    )


def host_memory_bytes() -> float:
    """Memory that a process here can have at the most: of the machine, its control group, or its own limit."""
    limits = [float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")]
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        limits.append(float(own))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # "max", or no such control group
            continue
    return min(limits)
