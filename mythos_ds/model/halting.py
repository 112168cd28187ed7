"""Adaptive depth per position: adaptive computation time over loops (ACT, Graves 2016).

`act`: the weights of a position's states sum to one (the last loop gets the remainder), and a halted position keeps its
state, keys and values. `act_openmythos` is the form of OpenMythos, for its weights: no remainder at the last loop,
nothing is frozen. Neither changes how many loops a rank runs: collectives inside the loop must match across ranks.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.cache_entry import CacheEntries
from mythos_ds.model.context import HaltedPositions

INITIAL_BIAS = -2.0
"""p = 0.12 at the start: about eight loops before halting."""


@dataclass(frozen=True)
class HaltingState:
    """The state that the loop carries beside h; all but `entries` are fp32 or bool [batch, seq]."""

    output: Tensor
    """fp32 [batch, seq, dim]: weighted sum of states so far."""
    cumulative: Tensor
    halted: Tensor
    ponder: Tensor
    """Loops run so far, plus the remainder where halted."""
    entries: CacheEntries = field(default_factory=dict)
    """The cache entries of the loop before, those of a halted position being of its last active loop; empty where
    nothing is frozen."""

    @classmethod
    def start(cls, h: Tensor) -> "HaltingState":
        """Makes the state before the first loop, for a state h [batch, seq, dim]."""
        zero = torch.zeros(h.shape[:2], device=h.device)
        return cls(torch.zeros_like(h, dtype=torch.float32), zero, zero.bool(), zero)

    def halted_positions(self, loop: int, layer: int) -> HaltedPositions | None:
        """Gives `layer` in `loop` the halted positions with what it keeps of them; None where nothing is frozen."""
        return HaltedPositions(self.halted, self.entries[loop - 1, layer]) if self.entries else None


class Halting(nn.Module):
    """The halting probability p = sigmoid(w h + b), fp32 [batch, seq]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.threshold = config.act_threshold
        self.exact = config.halting == "act"
        self.weight = nn.Parameter(torch.zeros(config.dim))
        self.bias = nn.Parameter(torch.full((1,), INITIAL_BIAS))

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h.float() @ self.weight.float() + self.bias.float())

    def step(self, state: HaltingState, h: Tensor, entries: CacheEntries, last: bool) -> HaltingState:
        """Adds a loop's new state h [batch, seq, dim] and cache entries; `last` is the final loop of the forward."""
        p = self(h)
        reached = state.cumulative + p >= self.threshold
        if self.exact and last:
            reached = torch.ones_like(reached)
        running = (~state.halted).float()
        remainder = (1.0 - state.cumulative).clamp_min(0.0)
        weight = torch.where(reached, remainder, p) * running
        return HaltingState(
            output=state.output + weight[..., None] * h.float(),
            cumulative=state.cumulative + p * running,
            halted=state.halted | reached,
            ponder=state.ponder + running * (1.0 + torch.where(reached, remainder, torch.zeros_like(p))),
            entries=entries if self.exact else {},
        )
