"""What this stack changes inside DeepSpeed, all of it, with the versions it was checked on. For the pipeline:

1. ZeRO-3's gradient norm (`DeepSpeedZeroOptimizer_Stage3._get_norm_groups`) knows the calling process's stage only. Its
   replacement on the one optimizer object adds all stages up, so that every stage clips and skips alike.
2. ZeRO-3's module hooks are removed from the one model object. They gather and release weights around every submodule,
   and before every forward compare the order of modules over *all* ranks, which hold different modules here.

For a run of several training stages, each with an engine of its own: what ZeRO-3 keeps of a model whose engine is gone.

tests/distributed/test_pipeline_guards.py shows what goes wrong without them.
"""

import re
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from mythos_ds.errors import ParallelError
from mythos_ds.parallel.groups import ParallelGroups

CHECKED = ((0, 19, 8), (0, 20, 0))
"""DeepSpeed versions from the first on and before the second."""

INVALID_NORM = -1.0
"""What DeepSpeed itself writes for a norm that is not finite; the step is then skipped."""


def require_checked_version(version: str = deepspeed_version) -> None:
    """Raises ParallelError where DeepSpeed is not one that the pipeline was checked on."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    first, end = CHECKED
    if not first <= numbers < end:
        allowed = f"{_dotted(first)} up to, not including, {_dotted(end)}"
        raise ParallelError(
            f"parallel.pp_size: the pipeline changes DeepSpeed in two places and was not checked on version {version}; "
            f"allowed: {allowed}; nearest: {_dotted(first)}, or pp_size 1.",
            code="MDS711",
        )


def couple_gradient_norm(optimizer: Any, groups: ParallelGroups, duplicate: "DuplicateNorm") -> None:
    """Makes a stage's ZeRO-3 optimizer clip by the norm over all stages: one all-reduce per step."""
    own_norms = optimizer._get_norm_groups

    def norm_over_stages() -> list[Tensor]:
        norm = combine_grad_norm_groups(own_norms())
        invalid = is_invalid_grad_norm(norm)
        # All ranks of a stage know its norm; one of them speaks for it.
        counts = groups.layout.dp_rank == 0 and not invalid
        square = norm.double().item() ** 2 - duplicate.square if counts else 0.0
        total, failed = groups.sum([square, float(invalid)])
        value = INVALID_NORM if failed else max(total, 0.0) ** 0.5
        return [torch.tensor(value, dtype=torch.float32, device=groups.device)]

    optimizer._get_norm_groups = norm_over_stages


class DuplicateNorm:
    """Squared norm of the gradient of weights that another stage counts too (a tied embedding), for this step."""

    square: float = 0.0


def remove_module_hooks(optimizer: Any) -> None:
    """Leaves gathering and releasing weights to the caller."""
    optimizer.parameter_offload.destroy()


def forget_models() -> None:
    """Empty what ZeRO-3 keeps of models beyond their engine: the stack of modules whose forward was the last, and the
    cache of a coordinator's method. The weights of every former engine would stay in memory otherwise."""
    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
