"""Adaptive depth per position: computation time over loops (ACT, Graves 2016), and a gate that is trained afterwards.

`act`: the weights of a position's states sum to one (the last loop gets the remainder), and a halted position keeps its
state, keys and values. `act_openmythos` is OpenMythos's form, for its weights: no remainder at the last loop, nothing
is frozen. Neither changes how many loops a rank runs: collectives inside the loop must match across ranks.
`gate` leaves the forward alone; inference/exit_rules.py reads it.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.cache_entry import CacheEntries
from mythos_ds.model.context import HaltedPositions
from mythos_ds.model.initializer import Initializer, Linear

INITIAL_BIAS = -2.0
"""p = 0.12 at the start: about eight loops before halting."""
_GATE_WIDTH = 64


@dataclass(frozen=True)
class HaltingState:
    """What the loop carries beside h; all but `entries` are fp32 or bool [batch, seq]."""

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
        """The state before the first loop, for a state h [batch, seq, dim]."""
        zero = torch.zeros(h.shape[:2], device=h.device)
        return cls(torch.zeros_like(h, dtype=torch.float32), zero, zero.bool(), zero)

    def halted_positions(self, loop: int, layer: int) -> HaltedPositions | None:
        """Gives `layer` in `loop` the halted positions with what it keeps of them; None where nothing is frozen."""
        return HaltedPositions(self.halted, self.entries[loop - 1, layer]) if self.entries else None


class Halting(nn.Module):
    """Halting probability p = sigmoid(w h + b), fp32 [batch, seq]."""

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


class Gate(nn.Module):
    """How much one more loop would take off each position's loss, in nats: a small network that reads the state, its
    last change, their ratio and the loop.

    It learns the improvement that a frozen model realises (the second stage of Ouro, arXiv 2510.25741; the amount
    itself here, not a probability), see train/exit_gate.py. A forward of the model does not run it.
    """

    scale: Tensor

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        inputs = 2 * config.dim + 2
        self.eps, self.last = config.norm_eps, config.max_loops
        self.hidden = Linear(inputs, _GATE_WIDTH, init.at("hidden"), inputs**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(_GATE_WIDTH))
        self.output = Linear(_GATE_WIDTH, 1, init.at("output"), 0.0)
        self.output_bias = nn.Parameter(torch.zeros(1))
        # What the network's output is counted in: improvements are thousandths of a nat in one model, nats in another.
        self.register_buffer("scale", torch.ones(1))

    def forward(self, after: Tensor, before: Tensor, loop: int) -> Tensor:
        """The states [batch, seq, dim] after and before `loop` (from 0; held at max_loops) -> fp32 [batch, seq]."""
        after, before = after.float(), before.float()
        factor = torch.rsqrt(after.square().mean(-1, keepdim=True) + self.eps)
        change = (after - before) * factor
        size = (change.square().mean(-1, keepdim=True) + self.eps).log()
        depth = torch.full_like(size, math.log(min(loop + 1, self.last)))
        x = torch.cat([after * factor, change, size, depth], -1).to(self.hidden.weight.dtype)
        hidden = nn.functional.silu(self.hidden(x) + self.hidden_bias)
        return ((self.output(hidden) + self.output_bias) * self.scale)[..., 0].float()
