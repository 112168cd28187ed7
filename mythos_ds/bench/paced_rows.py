"""A loop whose work lasts as long as the planner says, and whose rows take as long on their way, on real processes with
their real dispatchers: what is measured is who waits for what.

What is computed between two events of an exchange is slept out to its predicted time, and rows that arrive sooner are
waited for until theirs.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.reach import planned_dispatch
from mythos_ds.hardware import Gpu, read_gpu
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.expert_parallel import ExpertParallelMoE
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.overlap import overlap
from mythos_ds.parallel.row_exchange import Passage
from mythos_ds.plan.activation_trace import Workload, sample
from mythos_ds.plan.exchange import HopLinks, hop_links
from mythos_ds.plan.loop_order import SAMPLE_TOKENS, Event, Leave, Wait, Work, recorded
from mythos_ds.plan.memory import workload
from mythos_ds.plan.slots import Pace, Played, play

WORK_S = 4.0
"""What all work together is slept out to."""


class PlannedLoop:
    """The order of a run's loop by the planner, forward and backward, at a GPU's rates with links so fast that all
    exchanges together last as long as the work."""

    def __init__(self, resolved: ResolvedRun, ranks_per_node: int):
        dispatch = planned_dispatch(resolved, ranks_per_node)
        full = replace(workload(resolved), ranks_per_node=dispatch.ranks_per_node if dispatch.name == "per_node" else 1)
        self.load: Workload = sample(full, SAMPLE_TOKENS)
        self.layers = len(resolved.stages[0].part.recurrent)
        self.events: Sequence[Event] = recorded(self.load, self.layers, gradient=True)
        self.links: Sequence[HopLinks] = hop_links(resolved, 0, ranks_per_node)
        gpu = read_gpu("h200")
        found = play(self.events, Pace.of(gpu, full), self.links)
        faster = sum(found.hops) / found.busy
        gpu = replace(gpu, node_bandwidth=gpu.node_bandwidth * faster, network_bandwidth=gpu.network_bandwidth * faster)
        self.gpu: Gpu = gpu
        self.pace = Pace.of(gpu, full)

    def played(self) -> Played:
        """Plays the order back."""
        return play(self.events, self.pace, self.links)


class PacedRows:
    """Holds a process to the times of an order. Its clock is behind the real one only while the process sleeps."""

    def __init__(self, plan: PlannedLoop):
        self._plan, self._unit = plan, WORK_S / plan.played().busy
        self._left = list(reversed(plan.events))
        self._free = [0.0] * len(plan.links)
        self._arrivals: dict[int, float] = {}
        self.overrun = 0.0
        self.clock = time.monotonic()

    def work_ends(self) -> None:
        """Sleeps out the work that was done since the last event, if the order has any there."""
        if self._left and isinstance(self._left[-1], Work):
            work = self._left.pop()
            assert isinstance(work, Work)
            self._sleep_until(self.clock + self._unit * self._plan.pace.seconds(work))

    def _sleep_until(self, moment: float) -> None:
        left = moment - time.monotonic()
        self.overrun = max(self.overrun, -left)
        time.sleep(max(0.0, left))
        self.clock = max(moment, time.monotonic())

    def _next(self, kind: type) -> Any:
        self.work_ends()
        if not self._left or not isinstance(self._left[-1], kind):
            planned = type(self._left[-1]).__name__ if self._left else "the end"
            raise ValueError(f"the loop comes to {kind.__name__}, where the planner's order has {planned}")
        return self._left.pop()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Holds all passages of rows to their times; integers go as they go. Raises ValueError where the order of
        events is not the planner's."""
        start, finish = Passage._start, Passage._finish

        def started(passage: Passage, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
            if rows.dtype != torch.int64:
                event: Leave = self._next(Leave)
                seconds = self._plan.links[event.hop].seconds(event.bytes * self._plan.pace.times, self._plan.gpu)
                self._free[event.hop] = max(self.clock, self._free[event.hop]) + self._unit * seconds
                self._arrivals[id(passage)] = self._free[event.hop]
            return start(passage, rows, there, here)

        def finished(passage: Passage) -> Tensor:
            arrival = self._arrivals.pop(id(passage), None)
            if arrival is not None:
                self._next(Wait)
            received = finish(passage)
            if arrival is not None:
                self._sleep_until(max(arrival, self.clock))
            return received

        with patch.object(Passage, "_start", started), patch.object(Passage, "_finish", finished):
            yield

    @property
    def unfinished(self) -> int:
        """Counts the events that did not come."""
        return len(self._left)


def paced_loop(resolved: ResolvedRun, groups: ParallelGroups, ranks_per_node: int) -> dict[str, float]:
    """Runs a loop at the planner's pace: seconds of it, what the planner says, seconds of the work, and by how many
    the slowest work or wait took longer than it should. Collective."""
    plan = PlannedLoop(resolved, ranks_per_node)
    config, load = resolved.config, plan.load
    part = ModelChunk((), tuple(range(plan.layers)), (), embeds=False, loops=True, predicts=False)
    factory = functools.partial(ExpertParallelMoE, groups=groups)
    unit = config.parallel.activation_checkpointing
    model = MythosModel(config.model, part=part, moe_factory=factory, activation_checkpointing=unit)
    if config.parallel.overlap:
        overlap(model)
    context = model.make_context(torch.zeros(load.rows, load.seq_len, dtype=torch.int64), None, None, 2)
    generator = torch.Generator().manual_seed(groups.layout.rank)
    x = torch.randn(load.rows, load.seq_len, config.model.dim, generator=generator)

    def run() -> None:
        e = x.clone().requires_grad_()
        with model.recurrent.adding_up():
            new, _ = model.recurrent.step(e.float(), e, loop=0, context=context)
        new.sum().backward()

    run()
    groups.barrier()
    paced = PacedRows(plan)
    begun = paced.clock
    with paced.attached():
        run()
        paced.work_ends()
    if paced.unfinished:
        raise ValueError(f"{paced.unfinished} events of the planner's order did not come")
    played, scale = plan.played(), WORK_S / plan.played().busy
    seconds = paced.clock - begun
    return {"seconds": seconds, "predicted": scale * played.total, "work": WORK_S, "overrun": paced.overrun}
