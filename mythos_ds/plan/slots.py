"""Who waits for what in a loop: how long a GPU stands still because rows are on their way.

The order that `loop_order` records is played back with the times that a GPU takes for the work between, and links for
the rows; each hop's rows go one exchange after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.params import attention_head_widths
from mythos_ds.costs.reach import planned_dispatch
from mythos_ds.hardware import Gpu
from mythos_ds.plan.activation_trace import Workload, sample
from mythos_ds.plan.exchange import HopLinks, hop_links
from mythos_ds.plan.loop_order import SAMPLE_TOKENS, Event, Leave, Work, recorded
from mythos_ds.plan.memory import workload

_LAYERS = 2
"""Layers of a recorded loop; every further one adds what the last did."""
HOTTEST = 1.2
"""Rows of an exchange's hottest rank, over the mean, in the second of two figures (assumption)."""


@dataclass(frozen=True)
class Pace:
    """How fast a GPU does the work of a recorded order.

    Attributes:
        attention_row_flops: of a row of one head, at the run's own length.
        times: its tokens over the recorded ones.
    """

    gpu: Gpu
    attention_row_flops: float = 0.0
    times: float = 1.0

    @classmethod
    def of(cls, gpu: Gpu, load: Workload) -> "Pace":
        """Makes that of a workload, recorded at `SAMPLE_TOKENS`: causal attention, half of 2 FLOPs for each weight."""
        row = sum(attention_head_widths(load.model)) * (load.seq_len + 1)
        return cls(gpu, row, load.rows * load.seq_len / SAMPLE_TOKENS)

    def seconds(self, work: Work, hottest: float = 1.0) -> float:
        """Computes how long work takes, with `hottest` times the rows of experts."""
        gpu = self.gpu
        flops = work.expert_flops * hottest + work.other_flops + work.attention_rows * self.attention_row_flops
        products = self.times * flops / (gpu.peak_flops * gpu.kernel_share)
        moved = self.times * work.bytes / (gpu.memory_bandwidth * gpu.memory_share)
        return max(products + moved, work.launches * gpu.launch_s)


@dataclass(frozen=True)
class Played:
    """Seconds of a recorded order: until all is over, of computation, and of each hop's exchanges by themselves."""

    total: float
    busy: float
    hops: tuple[float, ...]


def play(events: Sequence[Event], pace: Pace, links: Sequence[HopLinks], *, hottest: float = 1.0) -> Played:
    """Plays events back. hottest: rows of this rank's experts, over the mean."""
    now = busy = 0.0
    free, taken, arrival = [0.0] * len(links), [0.0] * len(links), {}
    for event in events:
        if isinstance(event, Work):
            seconds = pace.seconds(event, hottest)
            now, busy = now + seconds, busy + seconds
        elif isinstance(event, Leave):
            seconds = links[event.hop].seconds(event.bytes * pace.times * hottest, pace.gpu)
            free[event.hop] = arrival[event.number] = max(now, free[event.hop]) + seconds
            taken[event.hop] += seconds
        else:
            now = max(now, arrival[event.number])
    return Played(now, busy, tuple(taken))


@dataclass(frozen=True)
class RowWaits:
    """Seconds of a step in which a GPU stands still for rows: with even routing, and how many more where all wait for
    the hottest rank of each exchange, with `HOTTEST` times the mean of rows. None: not known."""

    even: float
    hottest: float | None


def row_waits(resolved: ResolvedRun, loops: float, graded: float, gpu: Gpu, index: int) -> RowWaits:
    """Computes them for a GPU of pipeline stage `index` in a step of `loops` loops, `graded` with gradient."""
    stage = resolved.stages[index]
    layers = len(stage.part.recurrent)
    if resolved.layout(stage.first_rank).ep_size == 1 or not layers:
        return RowWaits(0.0, 0.0)
    dispatch = planned_dispatch(resolved, gpu.gpus_per_node)
    ranks = dispatch.ranks_per_node if dispatch.name == "per_node" else 1
    full = replace(workload(resolved, index), dispatch=dispatch.name, ranks_per_node=ranks)
    load, pace = sample(full, SAMPLE_TOKENS), Pace.of(gpu, full)
    links = hop_links(resolved, index, gpu.gpus_per_node)
    micro_batches = resolved.gradient_accumulation_steps

    def waits(gradient: bool, hottest: float) -> float:
        few, more = max(1, min(layers, _LAYERS) - 1), min(layers, _LAYERS)
        found = []
        for number in (few, more):
            events = recorded(load, number, gradient=gradient)
            busy = play(events, pace, links).busy
            found.append(play(events, pace, links, hottest=hottest).total - busy)
        return found[1] + (layers - more) * (found[1] - found[0])

    def of_a_step(hottest: float) -> float:
        return micro_batches * ((loops - graded) * waits(False, hottest) + graded * waits(True, hottest))

    even = of_a_step(1.0)
    known = full.dtype == torch.bfloat16  # only there are experts told apart from other products
    return RowWaits(even, of_a_step(HOTTEST) - even if known else None)
