"""The records of a forward: statistics written per (layer, loop), never added up, and closed when the forward ends.

Recomputation in the backward comes after that and writes nothing, so nothing counts twice.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_ds.model.sequence_depths import SequenceDepths


@dataclass(frozen=True)
class RoutingRecord:
    """Routing of one MoE layer in one loop of one micro-batch; means are over the tokens that count. All tensors are
    detached."""

    counts: Tensor
    """fp32 [n_experts]: tokens that chose each expert; with a depth per sequence [n_loops, n_experts], by the own loop
    index of the sequences, whose bias they were chosen with."""
    balance: Tensor | None = None
    """Scalar balance loss, unweighted; only where auxiliary losses are on."""
    z: Tensor | None = None
    """Scalar router z-loss, unweighted."""
    prebias_counts: Tensor | None = None
    """Like counts: what the scores alone would have chosen; only when details are asked for."""
    entropy: Tensor | None = None
    """Scalar: mean entropy of a token's normalised scores, in nats."""
    indices: Tensor | None = None
    """int64 [tokens, n_experts_per_tok]."""
    overlap_previous: Tensor | None = None
    """Scalar: mean Jaccard overlap of a token's expert set with that of the loop before."""


@dataclass(frozen=True)
class LoopRecord:
    """The carried state after one loop, of the sequences that run in it."""

    state_rms: Tensor
    """Scalar root mean square of h."""
    residual: Tensor
    """Scalar ||h_{t+1} - h_t|| / ||h_{t+1}||."""


class ForwardRecords:
    """The notes of one micro-batch.

    Attributes:
        details: whether the costlier statistics are wanted.
        routing: by recurrent layer (its index in the whole model) and loop.
        loops: the carried state by loop; only with details.
        decay_maximum: rho(A), a scalar; only with details.
        depths: the sequences' own depths; None where all have the same.
        lanes: the notes of parts of the micro-batch that run in turn, which then have its routing; else none.
    """

    def __init__(self, *, details: bool = False):
        self.details = details
        self.open = True
        self.routing: defaultdict[int, dict[int, RoutingRecord]] = defaultdict(dict)
        self.loops: dict[int, LoopRecord] = {}
        self.decay_maximum: Tensor | None = None
        self.depths: SequenceDepths | None = None
        self.lanes: list[ForwardRecords] = []
        self._state: Tensor | None = None

    @classmethod
    def closed(cls) -> "ForwardRecords":
        """Makes records that take no notes."""
        records = cls()
        records.close()
        return records

    def split(self, depths: Sequence[SequenceDepths | None]) -> list["ForwardRecords"]:
        """Makes the notes of as many parts, whose sequences have these depths."""
        self.lanes = [ForwardRecords(details=self.details) for _ in depths]
        for lane, own in zip(self.lanes, depths, strict=True):
            lane.depths, lane.open = own, self.open
        return self.lanes

    @property
    def wants_states(self) -> bool:
        """Says whether `start` and `note_state` would write anything."""
        return self.open and self.details

    @torch.no_grad()
    def start(self, state: Tensor, decay: Tensor) -> None:
        """The state h_0 [batch, seq, dim] and the diagonal of A [dim], before the first loop."""
        self._state = state.detach()
        self.decay_maximum = decay.detach().float().amax()

    @torch.no_grad()
    def note_state(self, loop: int, state: Tensor) -> None:
        """The state [batch, seq, dim] after `loop`."""
        assert self._state is not None, "start comes first"
        before, after = self._state.float(), state.detach().float()
        mean_square = after.square().mean()
        if self.depths is not None:
            begun = self.depths.begun(loop).float()
            before, after = (x * begun[:, None, None] for x in (before, after))
            mean_square = after.square().mean() / begun.mean().clamp_min(1e-30)
        norm = after.norm().clamp_min(1e-30)
        self.loops[loop] = LoopRecord(mean_square.sqrt(), (after - before).norm() / norm)
        self._state = state.detach()

    def close(self) -> None:
        """The forward is over: what comes now is recomputation."""
        self.open = False
        self._state = None
        for lane in self.lanes:
            lane.close()


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Averages values [tokens] where the mask (any shape, or none) is nonzero: a scalar, 0 where it never is."""
    return values.mean() if mask is None else (values * mask.flatten()).sum() / mask.sum().clamp_min(1)


def jaccard_overlap(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Averages over tokens, those of the mask, |a and b| / |a or b| for index sets [tokens, k]; a scalar."""
    k = first.shape[-1]
    shared = (first[:, :, None] == second[:, None, :]).any(-1).sum(-1)
    return masked_mean((shared / (2 * k - shared)).float(), mask)


def load_imbalance(counts: Tensor) -> Tensor:
    """max / mean of expert loads [..., n_experts] -> [...]; 1 is perfect balance."""
    return counts.amax(-1) / counts.mean(-1).clamp_min(torch.finfo(counts.dtype).tiny)
