"""What a forward notes beside its result. Written per loop, never added up: a recomputed loop writes the same again."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRecord:
    """Routing of one MoE layer in one loop of one micro-batch. All tensors are detached."""

    counts: Tensor
    """fp32 [n_experts]: tokens that chose each expert."""
    balance: Tensor | None = None
    """Scalar balance loss, unweighted; only where auxiliary losses are on."""
    z: Tensor | None = None
    """Scalar router z-loss, unweighted."""
    prebias_counts: Tensor | None = None
    """fp32 [n_experts]: what the scores alone would have chosen; only when details are asked for."""
    entropy: Tensor | None = None
    """Scalar: mean entropy of a token's normalised scores, in nats."""
    indices: Tensor | None = None
    """int64 [tokens, n_experts_per_tok]."""
    overlap_previous: Tensor | None = None
    """Scalar: mean Jaccard overlap of a token's expert set with that of the loop before."""


@dataclass(frozen=True)
class LoopRecord:
    """The carried state after one loop."""

    state_rms: Tensor
    """Scalar root mean square of h."""
    residual: Tensor
    """Scalar ||h_{t+1} - h_t|| / ||h_{t+1}||."""


def jaccard_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Mean over tokens of |a and b| / |a or b| for index sets [tokens, k]; a scalar."""
    k = first.shape[-1]
    shared = (first[:, :, None] == second[:, None, :]).any(-1).sum(-1)
    return (shared / (2 * k - shared)).float().mean()


def load_imbalance(counts: Tensor) -> Tensor:
    """max / mean of expert loads [..., n_experts] -> [...]; 1 is perfect balance."""
    return counts.amax(-1) / counts.mean(-1).clamp_min(torch.finfo(counts.dtype).tiny)
