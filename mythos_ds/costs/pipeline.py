"""Predicts what a pipeline's schedule costs: idle time, messages, visits that wait for their backward. Pure; no torch.

The orders are those that the pipeline runs (costs/schedule.py), simulated by list scheduling: a stage takes its
computations in order, each as soon as what it reads is there. A visit is the work of one virtual stage on a
micro-batch: visit v of stage s is virtual stage v * n_stages + s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mythos_ds.config.layout import ModelChunk, is_pipelined
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import dense_layer_flops, head_flops, lora_flops, recurrent_layer_flops
from mythos_ds.costs.schedule import Action, Order, ring_visits, training_order
from mythos_ds.errors import ConfigError

BACKWARD_COST = 2.0
"""A backward, in forwards (Kaplan et al. 2020, arXiv 2001.08361), without recomputation."""

_EXACT_COMPUTATIONS = 50_000
_ROUNDS = 4
MOST_COMPUTATIONS = 5_000_000
"""Forwards and backwards that are simulated at most: seconds."""

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
        n_micro_batches: M. Of very many, `simulation` has the first rounds; all else is of all.
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

    Raises ValueError for a run without pipeline, or a loop count below 1, and ConfigError where stages and visits are
    too many to be simulated.
    """
    if not is_pipelined(resolved.config.parallel):
        raise ValueError("parallel.pp_size: given 1, which is no pipeline")
    if n_loops < 1:
        raise ValueError(f"n_loops: given {n_loops}; allowed: at least 1")
    visits, micro_batches = visits_of(resolved, n_loops), resolved.gradient_accumulation_steps
    few = simulated_micro_batches(resolved, n_loops)
    work = computations(resolved, n_loops)
    if work > MOST_COMPUTATIONS:
        raise ConfigError(
            f"parallel.pp_size: {len(visits)} stages and {len(visits[0])} visits to each are {work:,} computations, "
            f"more than are simulated; allowed: {MOST_COMPUTATIONS:,}"
        )
    simulation = simulate(training_order(len(visits), len(visits[0]), few), visits)
    idle = simulation.idle if few == micro_batches else _idle_of(simulation, visits, few, micro_batches)
    sizes = [stage.size for stage in resolved.stages]
    return PipelinePrediction(
        n_loops=n_loops,
        n_micro_batches=micro_batches,
        bubble=sum(size * share for size, share in zip(sizes, idle, strict=True)) / sum(sizes),
        idle=idle,
        peak_held=simulation.peak_held,
        peak_held_bytes=simulation.peak_held_bytes,
        sent_bytes=sent_bytes(visits, micro_batches),
        visits=visits,
        simulation=simulation,
    )


def simulated_micro_batches(resolved: ResolvedRun, n_loops: int) -> int:
    """The micro-batches of a step that are simulated: all, or the first rounds of very many. From the second round on
    each takes as long as the one before, and no stage holds more; a test holds that."""
    micro_batches, n_stages = resolved.gradient_accumulation_steps, len(resolved.stages)
    ring = isinstance(resolved.config.parallel.pp_size, int)
    n_visits = ring_visits(n_loops) if ring else 1
    whole = 2 * n_stages * n_visits * micro_batches
    rounds, rest = divmod(micro_batches, n_stages)
    if whole <= _EXACT_COMPUTATIONS or rounds <= _ROUNDS or (ring and rest):
        return micro_batches
    return _ROUNDS * n_stages


def computations(resolved: ResolvedRun, n_loops: int) -> int:
    """Forwards and backwards that `predict` simulates."""
    n_visits = ring_visits(n_loops) if isinstance(resolved.config.parallel.pp_size, int) else 1
    return 2 * len(resolved.stages) * n_visits * simulated_micro_batches(resolved, n_loops)


def _idle_of(simulation: Simulation, visits: Visits, few: int, micro_batches: int) -> tuple[float, ...]:
    """Idle shares of all micro-batches, from the simulation of the first rounds."""
    n_stages = len(visits)
    fewer = simulate(training_order(n_stages, len(visits[0]), few - n_stages), visits)
    per_round = simulation.makespan - fewer.makespan
    makespan = simulation.makespan + (micro_batches - few) / n_stages * per_round
    return tuple(1.0 - busy / few * micro_batches / makespan for busy in simulation.busy)


def simulate(order: Order, visits: Visits, message_time: float = 0.0) -> Simulation:
    """Runs `order`; a message arrives `message_time` after its sender is done, which does not wait for it.

    Raises ValueError where the orders wait for each other.
    """
    finished: dict[tuple[int, int], float] = {}
    needs = _needs(visits)
    clocks, positions = [0.0] * len(order), [0] * len(order)
    timeline: list[list[Span]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(order):
            while positions[stage] < len(actions):
                action = actions[positions[stage]]
                back = action.backward
                work, needed = needs[back][stage][action.visit]
                start = clocks[stage]
                if needed is not None:
                    arrived = finished.get((needed, action.micro_batch))
                    if arrived is None:
                        break
                    start = max(start, arrived + message_time)
                visit = visits[stage][action.visit]
                end = start + (visit.backward if back else visit.forward)
                if visit.has_gradient or not back:
                    timeline[stage].append(Span(action, start, end))
                clocks[stage] = finished[work, action.micro_batch] = end
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


def _needs(visits: Visits) -> tuple[list[list[tuple[int, int | None]]], ...]:
    """Of forwards and of backwards, by stage and visit: the number of that work, and of the work whose message it
    reads; None where it reads none."""
    numbers: dict[tuple[int, int], int] = {}
    for stage, own in enumerate(visits):
        for visit in range(len(own)):
            numbers[stage, visit] = 2 * len(numbers)
    forwards: list[list[tuple[int, int | None]]] = []
    backwards: list[list[tuple[int, int | None]]] = []
    for stage, own in enumerate(visits):
        forwards.append([])
        backwards.append([])
        for visit, cost in enumerate(own):
            before, after = _before(stage, visit, visits), _after(stage, visit, visits)
            waits = after is not None and cost.has_gradient
            forwards[-1].append((numbers[stage, visit], None if before is None else numbers[before]))
            backwards[-1].append((numbers[stage, visit] + 1, numbers[after] + 1 if after and waits else None))
    return forwards, backwards


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
    recompute = 0.0 if resolved.config.parallel.activation_checkpointing == "none" else 1.0
    own_parts = lora_flops(model) if part.loops else 0.0
    forward = len(part.recurrent) * recurrent_layer_flops(model, context) + own_parts
    backward = (BACKWARD_COST + recompute) * forward
    if kind == "loop":
        return forward, backward
    return n_loops * forward, min(resolved.mean_backprop_depth, n_loops) * backward
