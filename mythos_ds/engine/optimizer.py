"""Parameter groups and the optimizer that DeepSpeed wraps.

Adam's update does not shrink with the width, so matrices that act on the width train at lr * lr_reference_dim / dim;
embeddings and vectors do not (Yang et al. 2022, table 8; Everett et al. 2024). Only matrices decay.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mythos_ds.config.schema import RunConfig, TrainingConfig
from mythos_ds.errors import ParallelError
from mythos_ds.hardware import compiler_problem
from mythos_ds.model.parameter_roles import INJECTION, Role, role_of

LR_SCALE = "lr_scale"
"""Key of a parameter group: factor on the scheduled learning rate."""


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: RunConfig) -> list[dict[str, Any]]:
    """Groups of one role each, for torch and for DeepSpeed; frozen parameters are in none.

    Expert-parallel weights get groups of their own. DeepSpeed asks for the key `moe` and, as the `name`, that of their
    process group (ZeRO 1 and 2 look the group up by it).
    """
    members: dict[tuple[Role, str | None], list[nn.Parameter]] = defaultdict(list)
    apart = config.training.injection_lr is not None
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        # Under zero.Init the local tensor is empty; ds_shape is the parameter's own.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        role = role_of(name, dimensions, injection_apart=apart)
        members[role, _expert_group_of(parameter)].append(parameter)
    scale = config.training.lr_reference_dim / config.model.dim
    decay = config.training.weight_decay
    if config.training.optimizer == "muon":
        return _muon_groups(members, config.training, scale)
    return [
        {
            "params": parameters,
            "name": role.name if expert_group is None else expert_group,
            "moe": expert_group is not None,
            "weight_decay": decay if role.decays else 0.0,
            LR_SCALE: _lr_scale(role, config.training, scale),
        }
        for (role, expert_group), parameters in members.items()
    ]


def _muon_groups(
    members: dict[tuple[Role, str | None], list[nn.Parameter]], training: TrainingConfig, scale: float
) -> list[dict[str, Any]]:
    """Muon for matrices, at a rate that needs no width scaling (an orthogonal update has a fixed size), Adam elsewhere.

    Both halves and DeepSpeed's ZeRO optimizers read `use_muon`, the latter from the parameters.
    """
    groups = []
    for (role, expert_group), parameters in members.items():
        for parameter in parameters:
            parameter.use_muon = role.orthogonal  # type: ignore[attr-defined]
        own: dict[str, Any] = {"betas": (training.beta1, training.beta2), "eps": training.eps}
        factor = _lr_scale(role, training, scale)
        if role.orthogonal:
            own = {"momentum": training.muon_momentum}
            factor = (training.muon_lr or training.lr) / training.lr
        groups.append(
            {
                "params": parameters,
                "name": role.name if expert_group is None else expert_group,
                "moe": expert_group is not None,
                "weight_decay": training.weight_decay if role.decays else 0.0,
                "lr": 0.0,
                "use_muon": role.orthogonal,
                LR_SCALE: factor,
                **own,
            }
        )
    return groups


def _lr_scale(role: Role, training: TrainingConfig, width_scale: float) -> float:
    """The factor on the scheduled learning rate."""
    if role == INJECTION and training.injection_lr is not None:
        return training.injection_lr / training.lr
    return width_scale if role.width_scaled else 1.0


def _expert_group_of(parameter: nn.Parameter) -> str | None:
    return getattr(parameter, "group_name", None)


def make_optimizer(
    groups: list[dict[str, Any]], training: TrainingConfig, *, offload: bool, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, SGD or Muon over `groups`; with the optimizer state offloaded from a GPU, DeepSpeed's CPU Adam.

    The learning rate is set in every step. It starts at zero, so that a step DeepSpeed takes by itself moves nothing.
    """
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    if training.optimizer == "muon":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # compiles kernels when imported

        kernel = {"fused": device.type == "cuda"}
        return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=kernel)
    options: dict[str, Any] = {"lr": 0.0, "betas": (training.beta1, training.beta2), "eps": training.eps}
    if offload and device.type != "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # One kernel per flat partition; torch's default on CUDA would allocate temporaries of the whole partition.
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def require_cpu_adam(config: RunConfig, device: torch.device) -> None:
    """Raises ParallelError where `make_optimizer` would have DeepSpeed compile its CPU Adam, and cannot."""
    offloads = config.parallel.offload_optimizer == "cpu" and config.training.optimizer == "adamw"
    if offloads and device.type == "cuda" and torch.version.hip is None and (problem := compiler_problem(os.environ)):
        raise ParallelError(problem, code="MDS731")


@contextmanager
def keeping_settings(optimizer: Any) -> Iterator[None]:
    """Let every group keep its settings of now (weight decay, betas, factor on the rate), while a checkpoint is loaded
    that holds those of its own start; `optimizer` may be a DeepSpeed wrapper."""
    held = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, held, strict=True):
        group.update(settings)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets every group's learning rate to lr * its scale; `optimizer` may be a DeepSpeed wrapper."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_SCALE]
