"""Derives everything that follows from a run's file and the number of processes. Pure; no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mythos_ds.config import deepspeed_section
from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.depth_distribution import FRESH, StageStart
from mythos_ds.config.dispatch import dispatch_dtype_problem, dispatch_problem, overlap_problem
from mythos_ds.config.divisors import divisors
from mythos_ds.config.layout import RankLayout, Stage, expert_stage_size, rows_per_micro_batch, stages_of
from mythos_ds.config.rules import check
from mythos_ds.config.schema import RunConfig
from mythos_ds.config.training_stages import STAGES, TrainingStage, as_file
from mythos_ds.errors import Coded, ConfigError

BIAS_RATE = 1e-3


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose every number is known.

    Attributes:
        tokens_per_step: tokens of one optimizer step over all processes, once a batch ramp has ended.
        mean_backprop_depth: the last loops of a step that carry gradient.
        router_bias_rate: u_b, the step of the selection bias per optimizer step.
        gradient_accumulation_steps: micro-batches of an optimizer step.
        stages: the pipeline's; one without pipeline.
        grows_from: the mean loop count that a depth curriculum grows from.
        deepspeed: the configuration handed to deepspeed.initialize.
    """

    config: RunConfig
    world_size: int
    ep_size: int
    gradient_accumulation_steps: int
    max_steps: int
    tokens_per_step: int
    mean_backprop_depth: int
    router_bias_rate: float
    deepspeed: dict[str, Any]
    stages: tuple[Stage, ...]
    grows_from: int = FRESH.mean_recurrence

    @property
    def total_samples(self) -> int:
        """Sequences of all optimizer steps."""
        return BatchSchedule.of(self.config.training).samples(self.max_steps)

    @property
    def total_tokens(self) -> int:
        """Tokens of all optimizer steps."""
        return self.total_samples * self.config.training.seq_len

    def layout(self, rank: int) -> RankLayout:
        """The place of a rank."""
        return RankLayout.of(self.stages, self.ep_size, rank)

    def as_dict(self) -> dict[str, Any]:
        """The configuration with every default, and under `_derived` what followed from it; loads as a file does."""
        derived = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        derived["stages"] = [asdict(stage) for stage in self.stages]
        return {**self.config.model_dump(mode="json"), "_derived": derived}


def resolve(config: RunConfig, world_size: int, grows_from: int = FRESH.mean_recurrence) -> ResolvedRun:
    """The run on `world_size` processes. grows_from: as in `ResolvedRun`.

    Raises:
        ConfigError: with every setting that contradicts another one or does not fit the processes.
    """
    problems = check.check(config) + check.check_world(config, world_size)
    if not problems:
        problems += _exchange_problems(config, world_size)
    if problems:
        raise ConfigError([message.after(f"{key}: ") for key, message in problems])
    training, model = config.training, config.model
    accumulation = training.global_batch_size // rows_per_micro_batch(config, world_size)
    bias_rate = training.router_bias_rate
    return ResolvedRun(
        config=config,
        world_size=world_size,
        ep_size=expert_parallel_size(config, world_size),
        gradient_accumulation_steps=accumulation,
        max_steps=check.steps_of(training),
        tokens_per_step=training.global_batch_size * training.seq_len,
        mean_backprop_depth=training.mean_backprop_depth or math.ceil(model.mean_recurrence / 2),
        router_bias_rate=bias_rate if bias_rate is not None else BIAS_RATE / model.mean_recurrence,
        deepspeed=deepspeed_section.build(config, accumulation),
        stages=stages_of(config, world_size),
        grows_from=grows_from,
    )


@dataclass(frozen=True)
class ResolvedStage:
    """A training stage whose every number is known. `name`: None where the file lists no stages."""

    name: str | None
    run: ResolvedRun


def resolve_stages(
    stages: Sequence[TrainingStage], world_size: int, former: TrainingStage | None = None
) -> tuple[ResolvedStage, ...]:
    """The training stages on `world_size` processes; `former`: the one that the first of them goes on from.

    Raises:
        ConfigError: as `resolve`, with the problems of all stages; one that a stage has inherited is told once.
    """
    resolved: list[ResolvedStage] = []
    problems: list[Coded] = []
    told: list[Coded] = []
    means = curriculum_starts([stage.config for stage in stages])
    if former is not None:
        means[0] = former.config.model.mean_recurrence
    for index, (stage, mean) in enumerate(zip(stages, means, strict=True)):
        try:
            resolved.append(ResolvedStage(stage.name, resolve(stage.config, world_size, mean)))
            found: list[Coded] = []
        except ConfigError as error:
            found = error.problems
        before = f"{STAGES}[{index}]." if index else ""
        problems += [problem.after(before) for problem in found if problem not in told]
        told = found
    if problems:
        raise ConfigError(problems)
    return tuple(resolved)


def curriculum_starts(configs: Sequence[RunConfig]) -> list[int]:
    """The mean loop count that a depth curriculum of each training stage grows from."""
    return [FRESH.mean_recurrence, *(config.model.mean_recurrence for config in configs[:-1])]


def starts_of(stages: Sequence[ResolvedStage]) -> list[StageStart]:
    """Where each of the training stages of a run begins."""
    made = [FRESH]
    for stage in stages[:-1]:
        before, run = made[-1], stage.run
        mean = run.config.model.mean_recurrence
        made.append(StageStart(before.step + run.max_steps, before.sample + run.total_samples, mean))
    return made


def whole_file(stages: Sequence[ResolvedStage]) -> dict[str, Any]:
    """The configuration of all stages with every default, and under `_derived` what followed from it, by stage where
    there are several; loads as a file does."""
    if stages[0].name is None:
        return stages[0].run.as_dict()
    dicts = [stage.run.as_dict() for stage in stages]
    derived = {str(stage.name): content.pop("_derived") for stage, content in zip(stages, dicts, strict=True)}
    content = as_file([(stage.name, content) for stage, content in zip(stages, dicts, strict=True)])
    return {**content, "_derived": derived}


def expert_parallel_size(config: RunConfig, world_size: int) -> int:
    """`ep_size`, with "auto" = the largest divisor of n_experts and of the processes (1 under ZeRO 0), of those that
    divide the GPUs of the cluster's nodes or are whole nodes."""
    if config.parallel.ep_size != "auto":
        return config.parallel.ep_size
    if config.parallel.zero_stage == 0:
        return 1
    common = math.gcd(config.model.n_experts, expert_stage_size(config.parallel.pp_size, world_size))
    per_node = config.cluster.gpus_per_node if config.cluster is not None else 1
    return next(n for n in reversed(divisors(common)) if per_node % n == 0 or n % per_node == 0)


def _exchange_problems(config: RunConfig, world_size: int) -> list[tuple[str, Coded]]:
    """Those of which the number of processes decides, by which it is known how many of them share experts."""
    per_node = config.cluster.gpus_per_node if config.cluster is not None else None
    ep_size, rows = expert_parallel_size(config, world_size), [stage.rows for stage in stages_of(config, world_size)]
    found = {
        "parallel.dispatch": dispatch_problem(config, ep_size, per_node),
        "parallel.dispatch_dtype": dispatch_dtype_problem(config, ep_size),
        "parallel.overlap": overlap_problem(config, ep_size, rows),
    }
    return [(key, message) for key, message in found.items() if message is not None]


def planned_world_size(config: RunConfig) -> int:
    """Processes of the cluster the file is laid out for, or 1; for plans made without a launcher."""
    return config.cluster.nodes * config.cluster.gpus_per_node if config.cluster is not None else 1
