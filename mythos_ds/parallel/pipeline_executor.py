"""Runs micro-batches through the pipeline stages in the order of costs/schedule.py.

Every process runs the actions of its stage in order. A visit is the work of one virtual stage on a micro-batch: of
stage s in turn v through the ring, virtual stage v * n_stages + s of interleaved 1F1B. Receive buffers exist from the
receive to the visit that reads them; a visit with gradient keeps its input and output until its backward, one without
keeps nothing. Gradients of weights add up in `.grad` over all visits and micro-batches; the caller reduces them once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_distributed
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mythos_ds.config.layout import Stage
from mythos_ds.costs.schedule import Action, ActionKind, actions_of, channel_of, ring_visits
from mythos_ds.errors import ParallelError
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.pipeline_stage import MicroBatch, StageModel, StageState, Visit
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.pipeline_stopwatch import Stopwatch

_FIRST_TORCH = (2, 9)
_SENDS_IN_FLIGHT = 4
"""Messages that wait for their receiver before the sender does too."""


def require_torch(version: str = torch.__version__) -> None:
    """Raises ParallelError where torch is too old for the pipeline: gradients in another dtype than the weights, and
    backwards from edges of the graph. Checked on torch 2.13."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < _FIRST_TORCH:
        first = ".".join(map(str, _FIRST_TORCH))
        raise ParallelError(
            f"parallel.pp_size: the pipeline needs torch >= {first}, this is {version}; nearest: pp_size 1.",
            code="MDS711",
        )


@dataclass(frozen=True)
class PipelineRun:
    """What one run over the micro-batches left behind.

    Attributes:
        outputs: per micro-batch the loss, or logits; on the last stage, else empty.
        records: per micro-batch what the layers of this stage noted.
        idle_share: part of the run's time in which this process computed nothing (waiting for other stages), 0..1.
        peak_held: the most (visit, micro-batch) pairs with gradient that waited for their backward at once.
    """

    outputs: list[Tensor]
    records: list[ForwardRecords]
    idle_share: float
    peak_held: int


class Pipeline:
    """The calling process's stage. Every method is collective: all ranks call it with the same arguments and with the
    rows of the same micro-batches; `tokens`, `targets` and `positions` are int64 [rows, seq]."""

    def __init__(self, model: StageModel, groups: ParallelGroups, stages: Sequence[Stage], dtype: torch.dtype):
        self.model, self.groups, self.stages, self.dtype = model, groups, stages, dtype
        # In the ring every stage holds a share of the loop's layers; else one holds the loop.
        self.ring = groups.layout.ring

    def train(
        self,
        batches: Sequence[dict[str, Tensor]],
        *,
        n_loops: int,
        n_grad_loops: int,
        aux: AuxLoss | None,
        details: bool,
        loss_divisor: float | None = None,
    ) -> PipelineRun:
        """Forward and backward of all micro-batches; gradients of the mean loss are left in `.grad`. loss_divisor as in
        MythosModel's forward."""
        n_grad_loops = min(n_grad_loops, n_loops)
        micro_batches = [
            self._micro_batch(batch, batch["targets"], aux, n_grad_loops, ForwardRecords(details=details), loss_divisor)
            for batch in batches
        ]
        return self._run(micro_batches, n_loops, n_grad_loops, training=True)

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[dict[str, Tensor]], n_loops: int, loss_divisor: float | None = None
    ) -> list[Tensor]:
        """Forwards alone: on the last stage the loss of each micro-batch, or its logits where it has no "targets"."""
        micro_batches = [
            self._micro_batch(batch, batch.get("targets"), None, n_loops, ForwardRecords(), loss_divisor)
            for batch in batches
        ]
        return self._run(micro_batches, n_loops, n_loops, training=False).outputs

    def _micro_batch(
        self,
        batch: dict[str, Tensor],
        targets: Tensor | None,
        aux: AuxLoss | None,
        n_grad_loops: int,
        records: ForwardRecords,
        loss_divisor: float | None,
    ) -> MicroBatch:
        context = self.model.make_context(batch["tokens"], batch.get("positions"), aux, n_grad_loops, records)
        return MicroBatch(batch["tokens"], targets, context, loss_divisor)

    def _run(self, micro_batches: list[MicroBatch], n_loops: int, n_grad_loops: int, *, training: bool) -> PipelineRun:
        run = _Run(self, micro_batches, n_loops, n_grad_loops, training)
        n_visits = ring_visits(n_loops) if self.ring else 1
        run.execute(
            actions_of(self.groups.layout.stage, len(self.stages), n_visits, len(micro_batches), training=training)
        )
        return run.result()

    def visit_at(self, stage: int, visit: int, n_loops: int, n_grad_loops: int) -> Visit:
        """Says what `stage` does as virtual stage visit * n_stages + stage."""
        if not self.ring:
            part = self.stages[stage].part
            kind = "loops" if part.loops else "prelude" if part.embeds else "coda"
            return Visit(kind, n_loops, n_grad_loops)  # type: ignore[arg-type]
        if visit == 0:
            return Visit("prelude", n_loops, n_grad_loops)
        if visit == ring_visits(n_loops) - 1:
            return Visit("coda", n_loops, n_grad_loops)
        return Visit("loop", n_loops, n_grad_loops, visit - 1)


@dataclass(frozen=True)
class _Saved:
    """What a visit's backward needs. Results are kept as edges of the graph, so that their memory is free once sent."""

    message: Tensor | None
    output: GradientEdge | None
    state: list[tuple[GradientEdge, Tensor]]
    """What the visit computed for the next one, and the leaf by which the next one read it."""


class _Run:
    """One pass of the micro-batches; holds all tensors that wait for something."""

    def __init__(
        self, pipeline: Pipeline, micro_batches: list[MicroBatch], n_loops: int, n_grad_loops: int, training: bool
    ):
        self.pipeline, self.micro_batches, self.training = pipeline, micro_batches, training
        self.depth = n_loops, n_grad_loops
        self.stage, self.n_stages = pipeline.groups.layout.stage, len(pipeline.stages)
        self.n_visits = ring_visits(n_loops) if pipeline.ring else 1
        self.arrivals: dict[tuple[ActionKind, int, int], tuple[Tensor, list[torch_distributed.Work]]] = {}
        self.departures: dict[tuple[ActionKind, int, int], Tensor] = {}
        self.in_flight: deque[tuple[Tensor, list[torch_distributed.Work]]] = deque()
        self.states: dict[int, StageState] = {}
        self.saved: dict[tuple[int, int], _Saved] = {}
        self.outputs: list[Tensor] = []
        self.peak_held = 0
        self.stopwatch = Stopwatch(pipeline.groups.device)

    def execute(self, actions: Sequence[Action]) -> None:
        """Runs the actions in order."""
        handlers = {
            ActionKind.FORWARD: self._forward,
            ActionKind.BACKWARD: self._backward,
            ActionKind.SEND_FORWARD: self._send,
            ActionKind.SEND_BACKWARD: self._send,
            ActionKind.RECEIVE_FORWARD: self._receive,
            ActionKind.RECEIVE_BACKWARD: self._receive,
        }
        for action in actions:
            handlers[action.kind](action)
        while self.in_flight:
            self._wait_for_oldest()
        self.stopwatch.finish()

    def result(self) -> PipelineRun:
        """What is left when all is done."""
        records = [batch.context.records for batch in self.micro_batches]
        return PipelineRun(self.outputs, records, self.stopwatch.idle_share(), self.peak_held)

    def _forward(self, action: Action) -> None:
        number, m = action.visit, action.micro_batch
        visit, batch = self._visit(self.stage, number), self.micro_batches[m]
        message = self._take(ActionKind.RECEIVE_FORWARD, action) if self._has_predecessor(number) else None
        if message is not None:
            message.requires_grad_(self._sends_gradient(action))
        with self.stopwatch.busy(), torch.set_grad_enabled(self.training):
            output, state = self.pipeline.model(visit, message, self.states.pop(m, ()), batch)
        if self.training and visit.has_gradient and not output.requires_grad:
            # Nothing up to here is trained; the next stage, which cannot know, sends a gradient all the same.
            output.requires_grad_()
        if number == self.n_visits - 1:
            batch.context.records.close()
        if state:
            self.states[m] = tuple(tensor if tensor.is_leaf else _leaf_of(tensor) for tensor in state)
        self._save(action, message, output, state)
        if self._has_successor(number):
            self.departures[ActionKind.SEND_FORWARD, number, m] = output.detach()
        else:
            self.outputs.append(output.detach())

    def _save(self, action: Action, message: Tensor | None, output: Tensor, state: StageState) -> None:
        # A tensor that is passed on as it came is its own leaf: its gradient gathers there.
        new = [
            (get_gradient_edge(tensor), leaf)
            for tensor, leaf in zip(state, self.states.get(action.micro_batch, ()), strict=True)
            if tensor.requires_grad and tensor is not leaf
        ]
        edge = get_gradient_edge(output) if output.requires_grad else None
        if edge is not None or new:
            self.saved[action.visit, action.micro_batch] = _Saved(message, edge, new)
        held = sum(saved.output is not None for saved in self.saved.values())
        self.peak_held = max(self.peak_held, held)

    def _backward(self, action: Action) -> None:
        number, m = action.visit, action.micro_batch
        saved = self.saved.pop((number, m), None)
        if saved is None:
            return
        edges = [edge for edge, leaf in saved.state if leaf.grad is not None]
        gradients = [leaf.grad for _, leaf in saved.state if leaf.grad is not None]
        if saved.output is not None:
            edges.append(saved.output)
            gradients.append(self._output_gradient(action))
        with self.stopwatch.busy():
            torch.autograd.backward(edges, gradients)
        if saved.message is not None and saved.message.grad is not None:
            self.departures[ActionKind.SEND_BACKWARD, number, m] = saved.message.grad

    def _output_gradient(self, action: Action) -> Tensor:
        if not self._has_successor(action.visit):
            return torch.tensor(1.0 / len(self.micro_batches), device=self.pipeline.groups.device)
        gradient = self._take(ActionKind.RECEIVE_BACKWARD, action)
        sizes = [stage.size for stage in self.pipeline.stages]
        following = (self.stage + 1) % self.n_stages
        if sizes[self.stage] != sizes[following]:
            # Each stage's gradients are averaged over its own processes.
            gradient.mul_(sizes[self.stage] / sizes[following])
        return gradient

    def _send(self, action: Action) -> None:
        forward = action.kind is ActionKind.SEND_FORWARD
        if not forward and not self._sends_gradient(action):
            return
        tensor = self.departures.pop((action.kind, action.visit, action.micro_batch)).contiguous()
        peers = self._peers(1 if forward else -1, tensor)
        group = self._channel(self.stage if forward else self._neighbour(-1), forward)
        works = [torch_distributed.isend(tensor[rows.start : rows.stop], rank, group) for rank, rows in peers]
        self.in_flight.append((tensor, [work for work in works if work is not None]))
        if len(self.in_flight) > _SENDS_IN_FLIGHT:
            self._wait_for_oldest()

    def _receive(self, action: Action) -> None:
        forward = action.kind is ActionKind.RECEIVE_FORWARD
        if not forward and not self._receives_gradient(action):
            return
        producer = self._producer(action.visit) if forward else self._visit(self.stage, action.visit)
        tokens = self.micro_batches[action.micro_batch].tokens
        dtype = torch.float32 if producer.kind == "loop" else self.pipeline.dtype
        buffer = torch.empty(*tokens.shape, self.pipeline.model.config.dim, dtype=dtype, device=tokens.device)
        peers = self._peers(-1 if forward else 1, buffer)
        group = self._channel(self._neighbour(-1) if forward else self.stage, forward)
        works = [torch_distributed.irecv(buffer[rows.start : rows.stop], rank, group) for rank, rows in peers]
        kind = ActionKind.RECEIVE_FORWARD if forward else ActionKind.RECEIVE_BACKWARD
        self.arrivals[kind, action.visit, action.micro_batch] = buffer, [work for work in works if work is not None]

    def _take(self, kind: ActionKind, action: Action) -> Tensor:
        buffer, works = self.arrivals.pop((kind, action.visit, action.micro_batch))
        for work in works:
            work.wait()
        return buffer

    def _wait_for_oldest(self) -> None:
        for work in self.in_flight.popleft()[1]:
            work.wait()

    def _visit(self, stage: int, number: int) -> Visit:
        return self.pipeline.visit_at(stage, number, *self.depth)

    def _producer(self, number: int) -> Visit:
        """The visit whose result comes to this stage's visit `number`."""
        return self._visit(self._neighbour(-1), number if self.stage else number - 1)

    def _neighbour(self, step: int) -> int:
        return (self.stage + step) % self.n_stages

    def _channel(self, edge: int, forward: bool) -> torch_distributed.ProcessGroup:
        """What a message between stage `edge` and the next one travels on."""
        return self.pipeline.groups.channels[channel_of(edge, self.n_stages, forward=forward, ring=self.pipeline.ring)]

    def _peers(self, step: int, tensor: Tensor) -> list[tuple[int, range]]:
        return self.pipeline.groups.layout.peers(self._neighbour(step), tensor.shape[0])

    def _has_predecessor(self, number: int) -> bool:
        return self.stage > 0 or number > 0

    def _has_successor(self, number: int) -> bool:
        return self.stage < self.n_stages - 1 or number < self.n_visits - 1

    def _sends_gradient(self, action: Action) -> bool:
        """Whether the visit's message gets a gradient, which its producer waits for."""
        return self.training and self._producer(action.visit).has_gradient

    def _receives_gradient(self, action: Action) -> bool:
        return self.training and self._visit(self.stage, action.visit).has_gradient


def _leaf_of(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
