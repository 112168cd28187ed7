"""What routers decided in a loop, kept for the recompute of the loop, or of their layers, in backward.

A recompute that chose experts anew would have to reproduce every score to the bit: another choice gives gradients of
experts that the forward did not use, or, with expert parallelism, other numbers of rows than were sent.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """The decision of one MoE layer in one loop: integers, without gradient. Weights are not kept but computed again
    from the recomputed scores of the chosen experts."""

    indices: Tensor
    """int64 [tokens, k]: the chosen experts."""
    counts: Tensor
    """int64 [n_experts]: rows of each expert."""
    route: Any = None
    """What the dispatcher knows of where rows go: no float, and small."""


RoutingReplay = dict[int, list[RoutingDecision]]
"""The decisions of one checkpointed loop, or layer in a loop, by recurrent layer (its index in the whole model). The
forward fills it; the recompute finds it full. It lives as long as the graph that may recompute it."""
