"""What a run compiles, and how its fp32 products are computed: settings of the process that the engine makes."""

import torch

from mythos_ds import log
from mythos_ds.config.schema import TrainingConfig
from mythos_ds.kernels.regions import compile_regions, compiler_problem
from mythos_ds.parallel.groups import ParallelGroups

_logger = log.get_logger(__name__)


def set_up_compilation(training: TrainingConfig, groups: ParallelGroups) -> None:
    """Let this process compile its regions where `training.compile` says so, or not; collective over all ranks. Where
    a rank has no working compiler none compiles, and rank 0 says why."""
    on_gpu = groups.device.type == "cuda"
    wanted = training.compile or ("regions" if on_gpu else "none")
    compile_regions("inductor" if wanted == "regions" and _compiles(groups) else None)
    if on_gpu:
        # The router's operands hold bf16 values, which TF32 has exactly: products in tensor cores, summed in fp32.
        torch.set_float32_matmul_precision("high" if training.dtype == "bfloat16" else "highest")


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
