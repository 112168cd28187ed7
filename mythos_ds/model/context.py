"""The context of a forward: what all its layers and loops share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.cache_entry import CacheEntry
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.rope import Rotary
from mythos_ds.model.routing_replay import RoutingReplay
from mythos_ds.model.sequence_depths import SequenceDepths


@dataclass(frozen=True)
class AuxLoss:
    """The weights of the losses that do not pass through the language-model loss.

    Their gradients enter in the routers and the halting unit themselves, so that a part of the model without a loss of
    its own gets them too; `scale` is what the trainer multiplies the loss by (1 / gradient accumulation steps).
    """

    balance: float = 0.0
    z: float = 0.0
    ponder: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class ForwardContext:
    """The positions, document bounds, auxiliary losses and records of one micro-batch."""

    rotary: Rotary
    documents: DocumentBounds | None
    aux: AuxLoss | None
    n_grad_loops: int
    records: ForwardRecords = field(default_factory=ForwardRecords)
    depths: SequenceDepths | None = None
    """None: all sequences run all loops."""
    replay: RoutingReplay | None = None
    """The routing of a layer or loop that will be recomputed, or is being; None where none is: then nothing is kept."""
    last_replayed: int | None = None
    """The layer that a recompute ends with, if nothing behind its mixture needs the results again."""

    exchange_chunks: int = 1
    """Equal parts of the tokens whose rows go to experts and back by themselves, so that those of one part travel while
    those of the next are computed."""
    lanes: tuple["ForwardContext", ...] = ()
    """The contexts of equal parts of the micro-batch that run in turn; none where it runs as a whole."""

    def for_recompute(self, last: int | None) -> "ForwardContext":
        """The same context, for one layer or loop that is recomputed in backward: its routing is decided once. last: as
        `last_replayed`."""
        lanes = tuple(lane.for_recompute(last) for lane in self.lanes)
        return replace(self, replay={}, last_replayed=last, lanes=lanes)

    def in_lanes(self, documents: Sequence[DocumentBounds | None], chunks: int) -> "ForwardContext":
        """The same context with one for each of as many equal parts of the sequences, whose documents are given. A
        part's auxiliary losses are means over its own sequences, and weigh as much as there are fewer of these; its
        tokens are exchanged in `chunks` chunks."""
        n = len(documents)
        aux = None if self.aux is None else replace(self.aux, scale=self.aux.scale / n)
        rotaries, depths = self.rotary.split(n), [None] * n if self.depths is None else self.depths.split(n)
        parts = zip(rotaries, documents, depths, self.records.split(depths), strict=True)
        lanes = tuple(
            ForwardContext(rotary, own_documents, aux, self.n_grad_loops, notes, own, exchange_chunks=chunks)
            for rotary, own_documents, own, notes in parts
        )
        return replace(self, lanes=lanes)

    def index_at(self, loop: int) -> LoopIndex:
        """The index that the model sees in loop `loop`: with a depth per sequence each one's own."""
        return LoopIndex(loop, None if self.depths is None else self.depths.index(loop))


@dataclass(frozen=True)
class HaltedPositions:
    """The positions that have halted (ACT), and what one attention layer keeps of them."""

    halted: Tensor
    """bool [batch, seq]."""
    entry: CacheEntry
    """The layer's entry, at each halted position that of the loop in which it halted."""
