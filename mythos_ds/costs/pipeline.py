"""Predicts what a pipeline's schedule costs: idle time, messages, visits that wait for their backward. Pure; no torch.

The orders are those that the pipeline runs (costs/schedule.py), simulated by list scheduling: a stage takes its
computations in order, each as soon as what it reads is there. A visit is the work of one virtual stage on a
micro-batch: visit v of stage s is virtual stage v * n_stages + s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from mythos_ds.config.layout import ModelChunk, is_pipelined
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import dense_layer_flops, head_flops, lora_flops, recurrent_layer_flops
from mythos_ds.costs.schedule import Action, Order, training_order

BACKWARD_COST = 2.0
"""A backward, in forwards (Kaplan et al. 2020, arXiv 2001.08361), without recomputation."""

LOOP_MESSAGE_BYTES = 4
"""The residual stream leaves a loop's layers in fp32."""

VisitKind = Literal["prelude", "loop", "loops", "coda"]


class Span(NamedTuple):
    """When a stage does something."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class VisitCost:
    """The cost of one virtual stage's work on a micro-batch, per process of the stage.

    Attributes:
        kind: prelude layers, layers of one loop, the whole loop ("loops"), or coda layers.
        forward: time, in any unit.
        backward: time, with what is recomputed; 0 without gradient.
        has_gradient: whether the result does; otherwise the visit is forgotten after its forward.
        received_bytes: the message it reads; 0 for tokens.
        sent_bytes: its result as a message; 0 for the last visit.
    """

    kind: VisitKind
    forward: float
    backward: float
    has_gradient: bool = True
    received_bytes: int = 0
    sent_bytes: int = 0


Visits = tuple[tuple[VisitCost, ...], ...]
"""Costs of each stage, by visit number; a micro-batch goes through all stages before it comes to the next number."""


@dataclass(frozen=True)
class Simulation:
    """One optimizer step without its weight gathers, gradient reduction and update.

    Attributes:
        makespan: time from the first forward to the last backward, in the unit of the visits.
        busy: of each stage.
        peak_held: of each stage, the most (visit, micro-batch) pairs with gradient between forward and backward.
        peak_held_bytes: of each stage, the most bytes of messages that such pairs keep, per process.
        timeline: of each stage; without the backwards that do nothing.
    """

    makespan: float
    busy: tuple[float, ...]
    peak_held: tuple[int, ...]
    peak_held_bytes: tuple[int, ...]
    timeline: tuple[tuple[Span, ...], ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan in which each stage does nothing, 0..1."""
        return tuple(1.0 - busy / self.makespan for busy in self.busy)

    def bubble(self, sizes: Sequence[int] | None = None) -> float:
        """Idle share over all stages, 0..1, each counted by its number of processes (None: equally)."""
        weights = sizes or [1] * len(self.busy)
        return sum(w * idle for w, idle in zip(weights, self.idle, strict=True)) / sum(weights)


@dataclass(frozen=True)
class PipelinePrediction:
    """What an optimizer step of a pipelined run will cost; an estimate by FLOPs, exact in counts and bytes.

    Attributes:
        n_loops: T.
        n_micro_batches: M.
        bubble: idle share of all processes' time, 0..1.
        idle: that of each stage.
        peak_held: of each stage, the most (visit, micro-batch) pairs that wait for their backward.
        peak_held_bytes: of each stage, the most bytes of messages kept for them, per process. The first stage's kept
            input of the loop, and what a visit computes, are not counted.
        sent_bytes: of each stage, point-to-point bytes that each of its processes sends per optimizer step.
        visits: what the stages do; times in FLOPs per process.
        simulation: where the times come from.
    """

    n_loops: int
    n_micro_batches: int
    bubble: float
    idle: tuple[float, ...]
    peak_held: tuple[int, ...]
    peak_held_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    visits: Visits
    simulation: Simulation


def predict(resolved: ResolvedRun, n_loops: int) -> PipelinePrediction:
    """An optimizer step at `n_loops` loops. Messages take no time, and FLOPs cost alike wherever they arise.

    Raises ValueError for a run without pipeline, or a loop count below 1.
    """
    if not is_pipelined(resolved.config.parallel):
        raise ValueError("parallel.pp_size: given 1, which is no pipeline")
    if n_loops < 1:
        raise ValueError(f"n_loops: given {n_loops}; allowed: at least 1")
    visits, micro_batches = visits_of(resolved, n_loops), resolved.gradient_accumulation_steps
    simulation = simulate(training_order(len(visits), len(visits[0]), micro_batches), visits)
    return PipelinePrediction(
        n_loops=n_loops,
        n_micro_batches=micro_batches,
        bubble=simulation.bubble([stage.size for stage in resolved.stages]),
        idle=simulation.idle,
        peak_held=simulation.peak_held,
        peak_held_bytes=simulation.peak_held_bytes,
        sent_bytes=sent_bytes(visits, micro_batches),
        visits=visits,
        simulation=simulation,
    )


def simulate(order: Order, visits: Visits, message_time: float = 0.0) -> Simulation:
    """Runs `order`; a message arrives `message_time` after its sender is done, which does not wait for it.

    Raises ValueError where the orders wait for each other.
    """
    finished: dict[tuple[int, Action], float] = {}
    clocks, positions = [0.0] * len(order), [0] * len(order)
    timeline: list[list[Span]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(order):
            for action in islice(actions, positions[stage], None):
                needed = _needed(stage, action, visits)
                if needed is not None and needed not in finished:
                    break
                start = clocks[stage] if needed is None else max(clocks[stage], finished[needed] + message_time)
                visit = visits[stage][action.visit]
                end = start + (visit.backward if action.backward else visit.forward)
                if visit.has_gradient or not action.backward:
                    timeline[stage].append(Span(action, start, end))
                clocks[stage] = finished[stage, action] = end
                positions[stage] += 1
                moved = True
    if len(finished) < sum(map(len, order)):
        raise ValueError("the stages' orders wait for each other")
    peaks = [_peaks(actions, own) for actions, own in zip(order, visits, strict=True)]
    return Simulation(
        makespan=max(clocks),
        busy=tuple(sum(span.end - span.start for span in spans) for spans in timeline),
        peak_held=tuple(count for count, _ in peaks),
        peak_held_bytes=tuple(size for _, size in peaks),
        timeline=tuple(tuple(spans) for spans in timeline),
    )


def _needed(stage: int, action: Action, visits: Visits) -> tuple[int, Action] | None:
    """The stage and action whose message `action` reads; None where it reads none."""
    if not action.backward:
        other = _before(stage, action.visit, visits)
    elif visits[stage][action.visit].has_gradient:
        other = _after(stage, action.visit, visits)
    else:
        other = None
    return None if other is None else (other[0], action._replace(visit=other[1]))


def _before(stage: int, visit: int, visits: Visits) -> tuple[int, int] | None:
    if stage:
        return stage - 1, visit
    return (len(visits) - 1, visit - 1) if visit else None


def _after(stage: int, visit: int, visits: Visits) -> tuple[int, int] | None:
    if stage < len(visits) - 1:
        return stage + 1, visit
    return (0, visit + 1) if visit < len(visits[0]) - 1 else None


def _peaks(actions: Sequence[Action], visits: Sequence[VisitCost]) -> tuple[int, int]:
    """The most held visits at once, and the most bytes. A stage works in order, so times do not matter."""
    count = size = most = largest = 0
    for action in actions:
        visit = visits[action.visit]
        if visit.has_gradient:
            sign = -1 if action.backward else 1
            count, size = count + sign, size + sign * visit.received_bytes
            most, largest = max(most, count), max(largest, size)
    return most, largest


def sent_bytes(visits: Visits, n_micro_batches: int) -> tuple[int, ...]:
    """Bytes that each process of each stage sends in a step: results onwards, and gradients of what came in back to
    where it came from, except where that has none."""
    totals = []
    for stage, own in enumerate(visits):
        total = 0
        for number, visit in enumerate(own):
            total += visit.sent_bytes
            producer = _before(stage, number, visits)
            if producer is not None and visits[producer[0]][producer[1]].has_gradient:
                total += visit.received_bytes
        totals.append(n_micro_batches * total)
    return tuple(totals)


def visits_of(resolved: ResolvedRun, n_loops: int) -> Visits:
    """The work of a pipelined run's stages at `n_loops` loops; times in FLOPs at the training sequence length, bytes,
    all per process and micro-batch."""
    seq_len, dim = resolved.config.training.seq_len, resolved.config.model.dim
    kinds = _kinds(resolved, n_loops)
    last = (len(kinds) - 1, len(kinds[0]) - 1)
    grad_loops = min(resolved.mean_backprop_depth, n_loops)
    everything = []
    for index, stage in enumerate(resolved.stages):
        tokens = stage.rows * seq_len
        costs = {kind: _costs(resolved, stage.part, kind, n_loops) for kind in set(kinds[index])}
        visits = []
        for number, kind in enumerate(kinds[index]):
            producer = kinds[index - 1][number] if index else kinds[-1][number - 1]
            has_gradient = kind != "loop" or number > n_loops - grad_loops
            forward, backward = costs[kind]
            received = tokens * dim * _message_width(resolved, producer)
            sent = tokens * dim * _message_width(resolved, kind)
            visits.append(
                VisitCost(
                    kind=kind,
                    forward=tokens * forward,
                    backward=tokens * backward if has_gradient else 0.0,
                    has_gradient=has_gradient,
                    received_bytes=received if index or number else 0,
                    sent_bytes=sent if (index, number) != last else 0,
                )
            )
        everything.append(tuple(visits))
    return tuple(everything)


def _message_width(resolved: ResolvedRun, producer: VisitKind) -> int:
    """Bytes of one value of a visit's result."""
    if producer == "loop":
        return LOOP_MESSAGE_BYTES
    return 2 if resolved.config.training.dtype == "bfloat16" else 4


def _kinds(resolved: ResolvedRun, n_loops: int) -> tuple[tuple[VisitKind, ...], ...]:
    """Of each stage's visits."""
    if isinstance(resolved.config.parallel.pp_size, int):
        loop: tuple[VisitKind, ...] = ("loop",)
        return (("prelude", *loop * n_loops, "coda"),) * len(resolved.stages)
    return ("prelude",), ("loops",), ("coda",)


def _costs(resolved: ResolvedRun, part: ModelChunk, kind: VisitKind, n_loops: int) -> tuple[float, float]:
    """FLOPs per token of a visit's forward, and of its backward where it has one."""
    model, context = resolved.config.model, resolved.config.training.seq_len
    if kind == "prelude":
        forward = len(part.prelude) * dense_layer_flops(model, context)
        return forward, BACKWARD_COST * forward
    if kind == "coda":
        head = head_flops(model) if part.predicts else 0.0
        forward = len(part.coda) * dense_layer_flops(model, context) + head
        return forward, BACKWARD_COST * forward
    recompute = 1.0 if resolved.config.parallel.activation_checkpointing == "loop" else 0.0
    own_parts = lora_flops(model) if part.loops else 0.0
    forward = len(part.recurrent) * recurrent_layer_flops(model, context) + own_parts
    backward = (BACKWARD_COST + recompute) * forward
    if kind == "loop":
        return forward, backward
    return n_loops * forward, min(resolved.mean_backprop_depth, n_loops) * backward
