"""What this stack changes inside DeepSpeed, all of it, with the versions it was checked on. For the pipeline:

1. ZeRO-3's gradient norm (`DeepSpeedZeroOptimizer_Stage3._get_norm_groups`) knows the calling process's stage only. Its
   replacement on the one optimizer object adds all stages up, so that every stage clips and skips alike.
2. ZeRO-3's module hooks are removed from the one model object. They gather and release weights around every submodule,
   and before every forward compare the order of modules over *all* ranks, which hold different modules here.

For ZeRO-3 with experts on several ranks: the order in which weights of different groups are gathered, which follows
addresses in memory, is made the same on all ranks.

For a run of several training stages, each with an engine of its own: what ZeRO-3 keeps of a model whose engine is gone.

tests/distributed/test_pipeline_guards.py and test_order.py show what goes wrong without them.
"""

import ast
import functools
import hashlib
import inspect
import re
import zlib
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from mythos_ds.errors import ParallelError
from mythos_ds.parallel.groups import ParallelGroups

CHECKED = ((0, 19, 8), (0, 20, 0))
"""DeepSpeed versions from the first on and before the second."""

INVALID_NORM = -1.0
"""What DeepSpeed itself writes for a norm that is not finite; the step is then skipped."""


_GATHER = "_PartitionedParameterCoordinator__all_gather_params"
_GATHER_METHODS = ("__all_gather_params", "__all_gather_params_")
_GATHER_SOURCE = "c0bc40c9c66e604eb1561f3209875a3a"
"""SHA-256, first half, of the source of what `order_gathers` replaces and of what that calls, as it was checked."""


def require_checked_version(version: str = deepspeed_version) -> None:
    """Raises ParallelError where DeepSpeed is not one that the pipeline was checked on."""
    if not _checked(version):
        raise ParallelError(
            f"parallel.pp_size: the pipeline changes DeepSpeed in two places and was not checked on version {version}; "
            f"allowed: {_ALLOWED}; nearest: {_dotted(CHECKED[0])}, or pp_size 1.",
            code="MDS711",
        )


def order_gathers(version: str = deepspeed_version) -> None:
    """Let ZeRO-3 gather the weights that a module needs, or will need next, in the order of their numbers.

    DeepSpeed holds them in a set, whose order depends on addresses, and issues a gather for each process group in the
    order in which that set comes by them. Ranks that gather over two overlapping groups in different orders may wait
    for each other for ever on NCCL. Raises ParallelError where DeepSpeed is not the one that this was made for.
    """
    issue = getattr(PartitionedParameterCoordinator, _GATHER, None)
    if getattr(issue, "in_order", False):
        return
    if issue is None or not _checked(version) or gather_source() != _GATHER_SOURCE:
        raise ParallelError(
            f"parallel.ep_size: with ZeRO-3 and experts on several ranks the order of weight gathers is set inside "
            f"DeepSpeed, and version {version} has other code there than the ones checked; allowed: {_ALLOWED}; "
            f"nearest: pip install deepspeed=={_dotted(CHECKED[0])}, or parallel.zero_stage=2, or parallel.ep_size=1.",
            code="MDS720",
        )

    @functools.wraps(issue)
    def in_order(self: PartitionedParameterCoordinator, params: set[nn.Parameter], forward: bool) -> None:
        issue(self, sorted(params, key=_number), forward)

    vars(in_order)["in_order"] = True
    setattr(PartitionedParameterCoordinator, _GATHER, in_order)


def gather_source() -> str:
    """The digest of DeepSpeed's source beneath `order_gathers`; it is text, so the same on every Python."""
    text = inspect.getsource(inspect.getmodule(PartitionedParameterCoordinator) or PartitionedParameterCoordinator)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    methods = [ast.get_source_segment(text, node) or "" for node in nodes if node.name in _GATHER_METHODS]
    return hashlib.sha256("\n".join(methods).encode()).hexdigest()[:32]


def require_same_numbers(model: nn.Module, groups: ParallelGroups) -> None:
    """Raises ParallelError on every rank where the ranks of a stage number their weights in different orders: what is
    gathered together would mix. Collective over all ranks."""
    by_number = sorted(model.named_parameters(), key=lambda entry: _number(entry[1]))
    own = zlib.crc32(repr([(name, tuple(vars(weight)["ds_shape"])) for name, weight in by_number]).encode())
    stages = range(len(groups.layout.stage_sizes))
    # The largest, and minus the smallest, digest of each stage.
    values = [sign * own if stage == groups.layout.stage else -float(2**33) for sign in (1, -1) for stage in stages]
    found = groups.agree(values, "max")
    apart = [stage for stage in stages if found[stage] != -found[len(stages) + stage]]
    if apart:
        raise ParallelError(
            f"the ranks of stages {apart} made their weights in different orders; allowed: one order for all ranks of "
            "a stage. A function that changes the model (`adapt`) must do the same on every rank.",
            code="MDS721",
        )


def _number(parameter: nn.Parameter) -> int:
    """ZeRO-3's: parameters are numbered as they are made, so the order is the same on all ranks."""
    return int(vars(parameter)["ds_id"])


def _checked(version: str) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return CHECKED[0] <= numbers < CHECKED[1]


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


_ALLOWED = f"{_dotted(CHECKED[0])} up to, not including, {_dotted(CHECKED[1])}"
