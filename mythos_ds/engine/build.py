"""Builds the sharded model and the engine. The one place that calls deepspeed.initialize."""

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from torch import Tensor, nn

from mythos_ds.config.error_messages import did_you_mean
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.engine.compilation import set_up_compilation
from mythos_ds.engine.deepspeed_patches import order_gathers, require_checked_version, require_same_numbers
from mythos_ds.engine.float_buffers import restore_float_buffers
from mythos_ds.engine.gradient_dtype import add_up_in_float32, adds_up_in_float32, require_float32_sums
from mythos_ds.engine.optimizer import make_optimizer, parameter_groups, require_cpu_adam
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import Coded, ConfigError, ParallelError
from mythos_ds.kernels.attention import AttentionCore, causal_attention
from mythos_ds.model.layers import DenseLayer
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.parameter_roles import is_expert, is_frozen
from mythos_ds.model.pipeline_stage import StageModel
from mythos_ds.model.recurrent import RecurrentBlock
from mythos_ds.parallel.dispatch_deepep import require_deepep
from mythos_ds.parallel.expert_parallel import ExpertParallelMoE
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.overlap import overlap
from mythos_ds.parallel.pipeline_executor import require_torch

Adapt = Callable[[MythosModel], None]
"""Changes a model right after it was made, in place; for experiments."""


def build_engine(
    resolved: ResolvedRun,
    groups: ParallelGroups,
    adapt: Adapt | None = None,
    *,
    attention_core: AttentionCore = causal_attention,
) -> TrainingEngine:
    """The engine of a resolved run; collective over all ranks. `attention_core` as in MythosModel.

    Errors: ParallelError where the groups do not belong to this run, for ZeRO 0 with expert parallelism, where DeepEP
    cannot run, and where an optimizer that is offloaded from a GPU cannot be compiled; ConfigError for values of the
    `deepspeed` section that DeepSpeed refuses, and for fp32 gradients where torch has none.
    """
    config = resolved.config
    stage = config.parallel.zero_stage
    require_float32_sums(config.training)
    require_cpu_adam(config, groups.device)
    _check_layout(resolved, groups)
    if groups.dispatch.name == "deepep":
        require_deepep(groups.device)
    set_up_compilation(config.training, groups)
    section = deepspeed_section(resolved, groups)
    model = build_model(resolved, groups, section, adapt, attention_core=attention_core)
    freeze(model, resolved, groups)
    if stage == 3:
        require_same_numbers(model, groups)
        if groups.layout.run_ep_size > 1:
            order_gathers()
    if stage == 3 and not groups.pipelined:
        # The module that owns the loop: gathered once in forward and once in backward for any loop count. A leaf that
        # is called several times gets wrong gradients; prelude and coda layers run once, and as leaves save hooks.
        leaves = set_z3_leaf_modules(model, [RecurrentBlock, DenseLayer])
        for leaf in leaves if config.training.frozen else ():
            leaf.register_forward_pre_hook(_with_gradient)
    optimizer = make_optimizer(
        parameter_groups(model.named_parameters(), config),
        config.training,
        offload=config.parallel.offload_optimizer == "cpu",
        device=groups.device,
    )
    with _settings_told(resolved):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=section, dist_init_required=False, mpu=groups.mpu
        )
    restore_float_buffers(model, groups.device)
    if adds_up_in_float32(config.training):
        add_up_in_float32(model.parameters())
    if stage == 0 and config.training.dtype == "bfloat16":
        _forget_blank_step(engine)
    return TrainingEngine(engine, resolved, groups)


def _with_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let one input of a module that trains have a gradient where none has, since all before it is frozen: by it ZeRO-3
    learns that a leaf's backward is over. Without it the leaf's gradients are averaged before they are computed."""
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    trains = any(parameter.requires_grad for parameter in module.parameters())
    if not torch.is_grad_enabled() or not trains or not tensors or any(value.requires_grad for value in tensors):
        return None
    own = tensors[0].detach().requires_grad_()
    return tuple(own if value is tensors[0] else value for value in inputs)


@contextlib.contextmanager
def _settings_told(resolved: ResolvedRun) -> Iterator[None]:
    """Let what DeepSpeed's own checks say of the `deepspeed` section be a ConfigError; without one, it is our fault."""
    try:
        yield
    except ValidationError as error:
        problems = [f"deepspeed: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError([Coded("MDS160", problem) for problem in problems]) from None
    except (AssertionError, ValueError, NotImplementedError) as error:
        if not resolved.config.deepspeed:
            raise
        message = f"deepspeed: DeepSpeed does not start with this section: {error}"
        raise ConfigError(message, code="MDS160") from error


def build_model(
    resolved: ResolvedRun,
    groups: ParallelGroups,
    section: dict[str, Any],
    adapt: Adapt | None = None,
    *,
    attention_core: AttentionCore = causal_attention,
) -> MythosModel:
    """The model, or the stage's part of it, with this rank's experts only. With ZeRO-3 each parameter is cut up as soon
    as it is made, so no rank ever holds the whole model."""
    config = resolved.config
    context: AbstractContextManager = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        with _settings_told(resolved):
            context = deepspeed.zero.Init(
                config_dict_or_path=section, data_parallel_group=groups.dp_group, mpu=groups.mpu
            )
    # One expert-parallel rank holds all experts: its MoE is the plain one, replicated or cut like any other weight.
    factory = MoE if groups.layout.ep_size == 1 else functools.partial(ExpertParallelMoE, groups=groups)
    kind = StageModel if groups.pipelined else MythosModel
    with context:
        model = kind(
            config.model,
            seed=None if config.training.init_from else config.training.seed,
            attention_core=attention_core,
            moe_factory=factory,
            activation_checkpointing=config.parallel.activation_checkpointing,
            part=resolved.stages[groups.layout.stage].part,
        )
        if config.parallel.overlap:
            overlap(model)
        if adapt is not None:
            adapt(model)
        return model


def freeze(model: MythosModel, resolved: ResolvedRun, groups: ParallelGroups) -> None:
    """Takes the gradient from the parameters that `training.frozen` names. Raises as `check_frozen` does."""
    check_frozen(resolved, groups)
    for name, parameter in model.named_parameters():
        if is_frozen(name, resolved.config.training.frozen):
            parameter.requires_grad_(False)


def check_frozen(resolved: ResolvedRun, groups: ParallelGroups) -> None:
    """Raises ConfigError on every rank for a pattern of `training.frozen` that names none of the whole model's
    parameters, and where nothing is left to train."""
    patterns = resolved.config.training.frozen
    if not patterns:
        return
    with torch.device("meta"):
        names = [name for name, _ in MythosModel(resolved.config.model, seed=None).named_parameters()]
    problems = []
    for pattern in patterns:
        if not any(is_frozen(name, [pattern]) for name in names):
            near = did_you_mean(pattern, [*names, *sorted({f"{name.rpartition('.')[0]}.*" for name in names})])
            problems.append(f"training.frozen: {pattern!r} given; no parameter has such a name{near}")
    if not problems and all(is_frozen(name, patterns) for name in names):
        problems.append(f"training.frozen: {json.dumps(patterns)} given; nothing is left to train")
    if not problems and groups.pipelined:
        problems += _idle_stages(resolved)
    if groups.layout.run_ep_size > 1 and any(is_expert(name) and is_frozen(name, patterns) for name in names):
        problems.append(
            f"training.frozen: routed experts given with ep_size {groups.layout.run_ep_size}; DeepSpeed keeps frozen "
            "expert-parallel weights in no checkpoint; allowed: ep_size 1; nearest: parallel.ep_size=1"
        )
    if problems:
        raise ConfigError([Coded("MDS161", problem) for problem in problems])


def _idle_stages(resolved: ResolvedRun) -> list[str]:
    """A problem for each stage of the pipeline of which every parameter is frozen: it would have no optimizer."""
    patterns, problems = resolved.config.training.frozen, []
    for number, stage in enumerate(resolved.stages):
        with torch.device("meta"):
            held = StageModel(resolved.config.model, seed=None, part=stage.part).named_parameters()
        if all(is_frozen(name, patterns) for name, _ in held):
            problems.append(
                f"training.frozen: {json.dumps(patterns)} given; nothing is left to train in stage {number} of "
                f"parallel.pp_size {resolved.config.parallel.pp_size}; nearest: parallel.pp_size=1"
            )
    return problems


def deepspeed_section(resolved: ResolvedRun, groups: ParallelGroups) -> dict[str, Any]:
    """The resolved DeepSpeed config with what only the engine knows."""
    section = copy.deepcopy(resolved.deepspeed)
    section["train_micro_batch_size_per_gpu"] = resolved.stages[groups.layout.stage].rows
    parallel, training = resolved.config.parallel, resolved.config.training
    if training.dtype == "bfloat16" and parallel.zero_stage > 0:
        # DeepSpeed's default adds micro-batches up in bf16.
        section.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return section


def _forget_blank_step(engine: Any) -> None:
    """DeepSpeed's mixed-precision optimizer of stage 0 steps once with zero gradients while it is built, which leaves
    Adam's step counter at 1: the first real update would be a quarter too small."""
    engine.optimizer.optimizer.state.clear()


def _check_layout(resolved: ResolvedRun, groups: ParallelGroups) -> None:
    wanted, found = resolved.layout(groups.rank), groups.layout
    if wanted != found:
        raise ParallelError(
            f"run resolved for ep_size {wanted.run_ep_size} and stages of {list(wanted.stage_sizes)} processes, but "
            f"the process groups are ep_size {found.run_ep_size} and {list(found.stage_sizes)}."
        )
    if groups.pipelined:
        require_checked_version()
        require_torch()
        ends = groups.layout.stage == 0 or groups.layout.is_last_stage
        if resolved.config.model.tie_embeddings and ends and groups.tie_group is None:
            raise ParallelError("model.tie_embeddings: given true, but the process groups were made without `tied`.")
    if resolved.config.parallel.zero_stage == 0 and groups.layout.ep_size > 1:
        raise ParallelError(
            "parallel.zero_stage: given 0 with expert parallelism; DeepSpeed then clips by a wrong norm. "
            "Allowed: 1, 2, 3; nearest: 1."
        )
