"""Two lanes: halves of a micro-batch whose layers run in turn, so that one computes while the other's rows travel.

Where a lane let rows leave for their experts, or back, and would wait for them next, the other goes on: over its
attention, its shared experts, or its experts. In backward autograd goes through the same work in the opposite order, so
that it overlaps there as well. No row is under way where a loop ends, nor where a recomputed unit does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.recurrent import RecurrentBlock
from mythos_ds.model.steps import Result, Steps

LANES = 2
CHUNKS = 2
"""Parts of a lane's tokens that go to experts and back by themselves: results of the first leave while the second is
computed. Without, experts that take three times as long as attention would leave a quarter of the exchange bare."""


def interleave(lanes: Sequence[Steps[Result]]) -> list[Result]:
    """Runs each lane to its next stop in turn, until all have ended, and returns their results."""
    results: dict[int, Result] = {}
    while len(results) < len(lanes):
        for index, lane in enumerate(lanes):
            if index not in results:
                try:
                    next(lane)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(lanes))]


class TwoLanes:
    """Runs the looped layers of a micro-batch in two lanes; one of an odd number of sequences, as in generation, runs
    as a whole."""

    def split(self, context: ForwardContext, positions: Tensor | None, rows: int) -> ForwardContext:
        """Adds the contexts of the two halves of `rows` sequences."""
        if rows % LANES:
            return context
        documents: list[DocumentBounds | None] = [None] * LANES
        if positions is not None and context.documents is not None:
            # The whole has tensors where the tokens are; positions may still be on the CPU.
            device = context.documents.order.device
            documents = [DocumentBounds.from_positions(part, device) for part in positions.chunk(LANES)]
        tokens = context.rotary.cos.shape[1] * rows // LANES
        return context.in_lanes(documents, CHUNKS if tokens % CHUNKS == 0 else 1)

    def run(
        self, block: RecurrentBlock, x: Tensor, loop: int, context: ForwardContext, e: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the block's layers once, in lanes: x [batch, seq, dim] -> the new x, and with e the injected state."""
        layers = [int(name) for name in block.layers]
        by_layer = block.activation_checkpointing == "layer" and torch.is_grad_enabled()
        units = [[layer] for layer in layers] if by_layer else [layers]
        xs, es = x.chunk(LANES), (None,) * LANES if e is None else e.chunk(LANES)
        injected: Sequence[Tensor | None] = (None,) * LANES
        for unit in units:
            results = block.recomputed("layer", _unit, context, block, loop, unit, xs, es, last=unit[-1])
            xs = tuple(x for x, _ in results)
            if e is not None and es[0] is not None:
                injected, es = tuple(begun for _, begun in results), (None,) * LANES
        begun = [part for part in injected if part is not None]
        return torch.cat(xs), torch.cat(begun) if begun else None


def _unit(
    context: ForwardContext,
    block: RecurrentBlock,
    loop: int,
    layers: Sequence[int],
    xs: Sequence[Tensor],
    es: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor | None]]:
    parts = zip(context.lanes, xs, es, strict=True)
    return interleave([_lane(block, lane, x, e, loop, layers) for lane, x, e in parts])


def _lane(
    block: RecurrentBlock, context: ForwardContext, x: Tensor, e: Tensor | None, loop: int, layers: Sequence[int]
) -> Steps[tuple[Tensor, Tensor | None]]:
    injected = None
    for layer in layers:
        x, begun, _ = yield from block.layer_steps(context, x, e, (loop, layer))
        injected, e = begun if injected is None else injected, None
    return x, injected


def overlap(model: MythosModel) -> None:
    """Let the model, or the stage's part of it, run its loops in two lanes from now on."""
    model.lane_driver = model.recurrent.lane_driver = TwoLanes()
