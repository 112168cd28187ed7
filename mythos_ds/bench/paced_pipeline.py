"""A pipeline's step whose computations last as long as the planner says, so that what is measured is the waiting.

On a few cores the processes of a pipeline wait for each other's cores as much as for each other's messages. Here each
forward and backward is computed and then slept out to its predicted time, which takes no core.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.pipeline import predict
from mythos_ds.costs.schedule import Action, actions_of
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.parallel import pipeline_executor
from mythos_ds.parallel.pipeline_stopwatch import Stopwatch

SHORTEST_S = 0.15
"""What the shortest computation that the planner counts is slept out to."""


class Paced(Stopwatch):
    """A stopwatch whose busy blocks last `seconds[backward, visit, micro_batch]`, or as long as they do."""

    def __init__(self, seconds: dict[tuple[bool, int, int], float]):
        super().__init__(torch.device("cpu"))
        self.seconds = seconds
        self.spans: list[tuple[float, float]] = []
        self.overrun = 0.0
        self._current = (False, -1, -1)

    def announced(self, *arguments: Any, **options: Any) -> Iterator[Action]:
        """The actions of a run, each noted before it is taken."""
        for action in actions_of(*arguments, **options):
            self._current = (action.backward, action.visit, action.micro_batch)
            yield action

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Waits after the work until its time is over."""
        started = time.monotonic()
        with super().busy():
            yield
            left = started + self.seconds.pop(self._current, 0.0) - time.monotonic()
            time.sleep(max(0.0, left))
        self.overrun = max(self.overrun, -left)
        self.spans.append((started, time.monotonic()))


def paced_step(
    engine: TrainingEngine, resolved: ResolvedRun, stage: int, batches: list[dict[str, torch.Tensor]], n_loops: int
) -> dict[str, float]:
    """The first start and last end of this process's computations (monotonic clock, s), their sum, and by how many
    seconds the slowest took longer than it should. Raises ValueError where a predicted computation was not run."""
    timeline = predict(resolved, n_loops).simulation.timeline
    planned = [{(a.backward, a.visit, a.micro_batch): end - start for a, start, end in spans} for spans in timeline]
    unit = SHORTEST_S / min(work for spans in planned for work in spans.values() if work)
    paced = Paced({action: unit * work for action, work in planned[stage].items()})
    with (
        patch.object(pipeline_executor, "Stopwatch", lambda device: paced),
        patch.object(pipeline_executor, "actions_of", paced.announced),
    ):
        engine.train_step(batches, n_loops=n_loops, n_grad_loops=min(resolved.mean_backprop_depth, n_loops), lr=1e-3)
    if paced.seconds:
        raise ValueError(f"{len(paced.seconds)} predicted computations were not run, {min(paced.seconds)} among them")
    busy = sum(end - start for start, end in paced.spans)
    return {"first": paced.spans[0][0], "last": paced.spans[-1][1], "busy": busy, "overrun": paced.overrun}


def idle_share(found: Sequence[dict[str, float]]) -> float:
    """Share of all processes' time, from the first start to the last end, in which they computed nothing."""
    makespan = max(own["last"] for own in found) - min(own["first"] for own in found)
    return 1 - sum(own["busy"] for own in found) / (len(found) * makespan)
