"""One rank of a large run on this machine: real groups under a pretended back end, real modules on the meta device.

Sizes of ZeRO-3's parts follow from the planner's arithmetic, which real engines agree with: DeepSpeed's own ZeRO-3
cannot start without its peers.
"""

import functools
from dataclasses import asdict, replace
from math import prod
from typing import Any

import torch

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.depth_distribution import FRESH, StageStart
from mythos_ds.config.layout import Stage
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.schedule import actions_of, ring_visits
from mythos_ds.errors import ParallelError
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.parallel.expert_parallel import ExpertParallelMoE
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pretended import pretend, ranks_of
from mythos_ds.plan.memory import parameter_shapes, states
from mythos_ds.plan.traffic import traffic
from mythos_ds.train.depth_sampler import DepthSampler


def rehearse(
    resolved: ResolvedRun, rank: int, gpus_per_node: int, step: int = 0, start: StageStart = FRESH
) -> dict[str, Any]:
    """What `rank` holds, computes and sends in optimizer step `step` of the run, which is one of the training stage
    that began at `start`. Ends the process group that it pretended.

    Raises ParallelError where its modules differ from what the planner counts.
    """
    groups = pretend(resolved, rank, gpus_per_node)
    try:
        return _describe(resolved, groups, gpus_per_node, step, start)
    finally:
        groups.close()


def _describe(
    resolved: ResolvedRun, groups: ParallelGroups, gpus_per_node: int, step: int, start: StageStart
) -> dict[str, Any]:
    config, layout, stage = resolved.config, groups.layout, resolved.stages[groups.layout.stage]
    factory = MoE if layout.ep_size == 1 else functools.partial(ExpertParallelMoE, groups=groups)
    with torch.device("meta"):
        model = MythosModel(config.model, seed=config.training.seed, moe_factory=factory, part=stage.part)
    held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _compare(held, resolved, stage, layout.ep_size)
    experts, ranks = layout.expert_range(config.model.n_experts), layout.ranks_of(layout.stage)
    n_loops = DepthSampler.of(config, start).loops_at(step)
    batches, own = BatchSchedule.of(config.training), step - start.step
    first, count = start.sample + batches.samples(own), batches.at(own)
    micro_batches = resolved.gradient_accumulation_steps * count // config.training.global_batch_size
    of_step = replace(resolved, gradient_accumulation_steps=micro_batches)
    return {
        "rank": groups.rank,
        "node": groups.rank // gpus_per_node,
        "local_rank": groups.rank % gpus_per_node,
        "stage": layout.stage,
        "layers": {name: list(getattr(stage.part, name)) for name in ("prelude", "recurrent", "coda")},
        "expert_group": ranks_of(groups.ep_group),
        "expert_copies": list(layout.expert_copies),
        "stage_ranks": [ranks[0], ranks[-1]],
        "experts": [experts[0], experts[-1]] if experts else [],
        "parameters_before_zero": sum(prod(shape) for shape in held.values()),
        "state_bytes": asdict(states(resolved, layout.stage)),
        "step": step,
        "n_loops": n_loops,
        "n_grad_loops": min(n_loops, resolved.mean_backprop_depth),
        "micro_batches": micro_batches,
        "rows_per_micro_batch": stage.rows,
        "samples_of_the_step": [first, first + count - 1],
        "actions": _actions(of_step, groups, n_loops),
        "traffic_bytes": asdict(traffic(of_step, n_loops, layout.stage)),
    }


def _compare(held: dict[str, tuple[int, ...]], resolved: ResolvedRun, stage: Stage, ep_size: int) -> None:
    expected = {
        name: (shape[0] // ep_size, *shape[1:]) if is_expert(name) else shape
        for name, shape in parameter_shapes(resolved.config.model, stage.part)
    }
    if held != expected:
        name = sorted(set(held.items()) ^ set(expected.items()))[0][0]
        raise ParallelError(f"{name}: the module has {held.get(name)}, the planner counts {expected.get(name)}")


def _actions(resolved: ResolvedRun, groups: ParallelGroups, n_loops: int) -> dict[str, int]:
    """How often the stage does what, in a training step of a pipeline."""
    if not groups.pipelined:
        return {}
    visits = ring_visits(n_loops) if isinstance(resolved.config.parallel.pp_size, int) else 1
    stages, micro_batches = len(groups.layout.stage_sizes), resolved.gradient_accumulation_steps
    counts: dict[str, int] = {}
    for action in actions_of(groups.layout.stage, stages, visits, micro_batches, True):
        counts[action.kind.value] = counts.get(action.kind.value, 0) + 1
    return counts
