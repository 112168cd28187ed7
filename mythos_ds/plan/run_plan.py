"""The plan of a run on given machines, of one training stage or several: its numbers, and the same for people."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.rules.check import steps_of
from mythos_ds.config.schema import RunConfig
from mythos_ds.config.training_stages import STAGES, TrainingStage
from mythos_ds.hardware import Gpu
from mythos_ds.plan.layouts import COMMON, Layout, examine_stages, remedied
from mythos_ds.plan.machine import machine, require_own_length
from mythos_ds.plan.report import as_numbers, print_run
from mythos_ds.plan.timing import run_costs

_WIDTH = 120


@dataclass(frozen=True)
class RunPlan:
    """What a run needs and costs. `numbers`: everything by name, names ending in their unit; `str` is for people."""

    name: str
    numbers: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU holds its part, in every training stage."""
        return bool(self.numbers["fits"])

    def __str__(self) -> str:
        text = io.StringIO()
        print_run(Console(file=text, width=_WIDTH), self.name, self.numbers)
        return text.getvalue()


def plan_numbers(
    layouts: Sequence[Layout],
    stages: Sequence[TrainingStage],
    gpu: Gpu,
    tokens: float | None,
    others: Sequence[tuple[Layout, ...]],
) -> tuple[dict[str, Any], tuple[Layout, ...] | None]:
    """What the plan says of a layout, given as that of each training stage, and the first change that makes it fit
    where it does not. tokens: of a file that lists no stages; None = those it is configured for."""
    gpus = layouts[0].resolved.world_size
    fits = all(layout.fits(gpu) for layout in layouts)
    remedy = None if fits else remedied([stage.config for stage in stages], gpus, gpu)
    if stages[0].name is None:
        count = float(tokens_of(stages[0].config)) if tokens is None else tokens
        first = None if remedy is None else remedy[0]
        return as_numbers(layouts[0], gpu, count, first, [other[0] for other in others]), remedy
    parts = []
    for stage, layout in zip(stages, layouts, strict=True):
        run = layout.resolved
        length = {"seq_len": run.config.training.seq_len, "steps": run.max_steps, "tokens": run.total_tokens}
        own = as_numbers(layout, gpu, float(run.total_tokens), None, [])
        of_the_run = ("remedy", "layouts")
        parts.append({"name": stage.name, **length, **{key: own[key] for key in own if key not in of_the_run}})
    fullest = max(parts, key=lambda part: part["memory_total_bytes"])
    return {
        "gpus": gpus,
        "gpu": gpu.name,
        "fits": fits,
        "binding_stage": fullest["name"],
        "binding": fullest["binding"],
        "remedy": None if remedy is None else _as_overrides(stages, remedy),
        "memory_total_bytes": fullest["memory_total_bytes"],
        "memory_limit_bytes": gpu.memory_bytes,
        "tokens": sum(part["tokens"] for part in parts),
        "steps": sum(part["steps"] for part in parts),
        "costs": run_costs([part["costs"] for part in parts]),
        "layouts": [
            {
                "changes": _as_overrides(stages, other),
                "memory_total_bytes": max(layout.memory.total for layout in other),
                "days_as_built": sum(
                    layout.timing.built_s * layout.resolved.total_tokens / layout.timing.tokens_per_step / 86400
                    for layout in other
                ),
            }
            for other in others
        ],
        "stages": parts,
    }, remedy


def _as_overrides(stages: Sequence[TrainingStage], layouts: Sequence[Layout]) -> dict[str, Any]:
    """The changes of a layout by the names that overrides have. What changes in one training stage is given for each: a
    later one would inherit it."""
    keys = [key for layout in layouts for key in layout.changes]
    made = {key: layouts[0].changes[key] for key in layouts[0].changes if key.startswith(COMMON)}
    for key in dict.fromkeys(key for key in keys if not key.startswith(COMMON)):
        section, field = key.split(".")
        for stage, layout in zip(stages, layouts, strict=True):
            made[f"{STAGES}.{stage.name}.{key}"] = getattr(getattr(layout.resolved.config, section), field)
    return made


def plan_config(
    name: str,
    stages: Sequence[TrainingStage],
    gpus: int | None = None,
    gpu: str | None = None,
    tokens: float | None = None,
) -> RunPlan:
    """The plan of a run's own layout. Raises ConfigError where it does not fit the number of GPUs."""
    require_own_length("tokens", tokens, stages)
    count, kind = machine(stages[0].config, gpus, gpu)
    numbers, _ = plan_numbers(examine_stages([s.config for s in stages], count, kind), stages, kind, tokens, [])
    return RunPlan(name, numbers)


def tokens_of(config: RunConfig) -> int:
    """Tokens of the configured training stage."""
    training = config.training
    return BatchSchedule.of(training).samples(steps_of(training)) * training.seq_len
