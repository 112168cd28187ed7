"""The part of the model that one pipeline stage holds, run visit by visit; it knows no processes and no messages.

A visit is the work of one virtual stage on a micro-batch: of stage s in turn v through the ring, virtual stage
v * n_stages + s of interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mythos_ds.model.context import ForwardContext
from mythos_ds.model.mythos import MythosModel

StageState = tuple[Tensor, ...]
"""What a stage holds of a micro-batch from one visit to the next: e, and with `post` injection the injected state."""


@dataclass(frozen=True)
class Visit:
    """The work of one virtual stage on a micro-batch: its prelude layers, its layers of one loop, the whole loop
    ("loops"), or its coda layers. Loops are counted from 0; the last n_grad_loops of n_loops carry gradient."""

    kind: Literal["prelude", "loop", "loops", "coda"]
    n_loops: int
    n_grad_loops: int
    loop: int = 0

    @property
    def has_gradient(self) -> bool:
        """Says whether the result of the visit carries gradient, in training."""
        return self.kind != "loop" or self.is_grad_loop(self.loop)

    def is_grad_loop(self, loop: int) -> bool:
        """Says whether `loop` carries gradient, in training."""
        return loop >= self.n_loops - self.n_grad_loops


@dataclass(frozen=True)
class MicroBatch:
    """The rows of a micro-batch that this process works on. Each stage derives the context by itself."""

    tokens: Tensor
    """int64 [batch, seq]."""
    targets: Tensor | None
    """The next tokens, int64 [batch, seq]; None where logits are wanted."""
    context: ForwardContext
    loss_divisor: float | None = None
    """As in MythosModel's forward."""


class StageModel(MythosModel):
    """The modules of `part`; a forward is one visit.

    The stage with the loop's own parts keeps its `StageState` between visits, so that one tensor per
    micro-batch travels: the residual stream.
    """

    def forward(  # type: ignore[override]
        self, visit: Visit, message: Tensor | None, state: StageState, batch: MicroBatch
    ) -> tuple[Tensor, StageState]:
        """Runs one visit. message: what the stage before sent, [batch, seq, dim]; None for the first prelude visit.

        Returns the message to the next stage (in the last one the loss, or logits without targets), and the stage's
        state for its next visit.
        """
        if visit.kind == "prelude":
            x = self.embed(batch.tokens) if message is None else message
            return self.run_prelude(x, batch.context), ()
        assert message is not None, "only the first visit starts without a message"
        if visit.kind == "coda":
            return self._coda(visit, message, state, batch), ()
        if visit.kind == "loops":
            e = self.normed(message)
            return self.recurrent(e, visit.n_loops, batch.context).to(e.dtype), ()
        if not visit.has_gradient:
            return self._loop(batch.context, visit, message, state)
        return self.recurrent.recomputed("loop", self._loop, batch.context, visit, message, state)

    def _loop(
        self, context: ForwardContext, visit: Visit, message: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        if not self.part.loops:
            with self._gradient(visit, visit.loop):
                return self.recurrent.run_layers(message, visit.loop, context)[0], ()
        if visit.loop == 0:
            # With gradient also where the first loops have none; never the message itself, as later visits read it too.
            e = self.normed(message.view_as(message))
            h = self.recurrent.start(e, context)
        else:
            e, h = state[0], self._end_loop(context, visit, message, state, visit.loop - 1)
        with self._gradient(visit, visit.loop):
            x, injected, _ = self.recurrent.run_layers(h, visit.loop, context, e=e)
        return x, (e,) if injected is None or not self.recurrent.post else (e, injected)

    def _end_loop(self, context: ForwardContext, visit: Visit, message: Tensor, state: StageState, loop: int) -> Tensor:
        """The state after `loop`, whose last layer's output came back from the ring."""
        with self._gradient(visit, loop):
            injected = state[1] if self.recurrent.post else None
            h = self.recurrent.end(message, injected, context.index_at(loop))
        if context.records.wants_states:
            context.records.note_state(loop, h)
        return h

    def _coda(self, visit: Visit, message: Tensor, state: StageState, batch: MicroBatch) -> Tensor:
        x = message
        if state:
            x = self._end_loop(batch.context, visit, message, state, visit.n_loops - 1).float().to(state[0].dtype)
        x = self.run_coda(x, batch.context)
        return self.logits_or_loss(x, batch.targets, batch.loss_divisor) if self.part.predicts else x

    @staticmethod
    def _gradient(visit: Visit, loop: int) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and visit.is_grad_loop(loop))
