"""What a run compiles, and how its fp32 products are computed: settings of the process, for as long as the engine is
open."""

import torch

from mythos_ds import log
from mythos_ds.config.schema import TrainingConfig
from mythos_ds.kernels.regions import compile_regions, compiler_problem
from mythos_ds.parallel.groups import ParallelGroups

_logger = log.get_logger(__name__)


class _Before:
    """What the process was set to before the run."""

    precision: str | None = None


def set_up_compilation(training: TrainingConfig, groups: ParallelGroups) -> None:
    """Let this process compile its regions where `training.compile` says so, or not; collective over all ranks. Where
    a rank has no working compiler none compiles, and rank 0 says why."""
    on_gpu = groups.device.type == "cuda"
    wanted = training.compile or ("regions" if on_gpu else "none")
    compile_regions("inductor" if wanted == "regions" and _compiles(groups) else None)
    if on_gpu:
        _Before.precision = _Before.precision or torch.get_float32_matmul_precision()
        # The router's operands hold bf16 values, which TF32 has exactly: products in tensor cores, summed in fp32.
        torch.set_float32_matmul_precision("high" if training.dtype == "bfloat16" else "highest")


def end_compilation() -> None:
    """Let the process run regions as they are written again, and compute fp32 products as before the run."""
    compile_regions(None)
    if _Before.precision is not None:
        torch.set_float32_matmul_precision(_Before.precision)
        _Before.precision = None


def _compiles(groups: ParallelGroups) -> bool:
    problem = compiler_problem(groups.device)
    if not groups.any(problem is not None):
        return True
    if groups.rank == 0:
        _logger.warning(
            'training.compile: "regions", but nothing can be compiled here (%s): operations run one by one, slower.',
            problem or "on another rank",
        )
    return False
