"""The plan of one configuration on given machines: its numbers, and the same for people."""

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mythos_ds.config.batch_ramp import BatchSchedule
from mythos_ds.config.rules.check import steps_of
from mythos_ds.config.schema import RunConfig
from mythos_ds.hardware import Gpu
from mythos_ds.plan.layouts import Layout, examine, first_remedy
from mythos_ds.plan.machine import machine
from mythos_ds.plan.report import as_numbers, print_plan

_WIDTH = 120


@dataclass(frozen=True)
class RunPlan:
    """What a run needs and costs. `numbers`: everything by name, names ending in their unit; `str` is for people."""

    name: str
    numbers: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU holds its part."""
        return bool(self.numbers["fits"])

    def __str__(self) -> str:
        text = io.StringIO()
        print_plan(Console(file=text, width=_WIDTH), self.name, self.numbers)
        return text.getvalue()


def plan_numbers(
    layout: Layout, config: RunConfig, gpus: int, gpu: Gpu, tokens: float | None, others: list[Layout]
) -> tuple[dict[str, Any], Layout | None]:
    """What the plan says of a layout, and the first change that makes it fit where it does not."""
    remedy = None if layout.fits(gpu) else first_remedy(config, gpus, gpu)
    return as_numbers(layout, gpu, float(tokens_of(config)) if tokens is None else tokens, remedy, others), remedy


def plan_config(
    name: str, config: RunConfig, gpus: int | None = None, gpu: str | None = None, tokens: float | None = None
) -> RunPlan:
    """The plan of the configuration's own layout. Raises ConfigError where it does not fit the number of GPUs."""
    count, kind = machine(config, gpus, gpu)
    numbers, _ = plan_numbers(examine(config, count, kind, {}), config, count, kind, tokens, [])
    return RunPlan(name, numbers)


def tokens_of(config: RunConfig) -> int:
    """Tokens of the configured run."""
    training = config.training
    return BatchSchedule.of(training).samples(steps_of(training)) * training.seq_len
