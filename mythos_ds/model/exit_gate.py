"""The exit gate: a small network that is trained on a frozen model and says what one more loop is worth.

It leaves the forward alone; inference/exit_rules.py reads it.
"""

import math

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.initializer import Initializer, Linear

_GATE_WIDTH = 64


class ExitGate(nn.Module):
    """The estimate of what one more loop would take off each position's loss, in nats: a small network that reads the
    state, its last change, their ratio and the loop.

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
