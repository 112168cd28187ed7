"""Token-choice router with balancing over loops (loss-free); computes in fp32 whatever the parameters' dtype."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.routing import best_experts, biased_choice, router_scores, routing_weights, selection_bias
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.loop_index import LoopIndex

MIN_ROW_UPDATES = 100
"""Updates after which a loop's own bias row is trusted; deeper loops use the last trusted row."""

BIAS_SHARES = (1.0, 0.25)
"""How fast the bias shared by all loops and the one of each loop move, in units of u_b."""


@dataclass(frozen=True)
class Routing:
    """The choices of one router call."""

    weights: Tensor
    """fp32 [tokens, k]: normalised routing weights, with gradient."""
    indices: Tensor
    """int64 [tokens, k]."""
    logits: Tensor
    """fp32 [tokens, n_experts]."""
    scores: Tensor
    """fp32 [tokens, n_experts], positive."""


class Router(nn.Module):
    """scores = sigmoid or softmax of x W^T; the top-k of score + bias are chosen, weighted by their scores alone.

    The selection bias follows the loss-free rule of Wang et al. 2024 (DeepSeek-V3), split into a part shared by all
    loops and a smaller one per loop: bias[e] + loop_bias[min(t, t_seen)][e].
    """

    bias: Tensor
    loop_bias: Tensor
    loop_updates: Tensor

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.k = config.n_experts_per_tok
        self.score = config.router_score
        self.bias_shares = BIAS_SHARES
        self.route_scale = config.route_scale
        self.n_groups = config.n_expert_groups
        self.n_limited_groups = config.n_limited_groups
        self.weight = nn.Parameter(torch.zeros(config.n_experts, config.dim))
        init.normal_(self.weight.data, "weight", config.resolved_init_std)
        self.register_buffer("bias", torch.zeros(config.n_experts, dtype=torch.float32))
        self.register_buffer("loop_bias", torch.zeros(config.max_loops, config.n_experts, dtype=torch.float32))
        self.register_buffer("loop_updates", torch.zeros(config.max_loops, dtype=torch.float32))

    def forward(self, x: Tensor, loop: LoopIndex, indices: Tensor | None = None) -> Routing:
        """Routes x [tokens, dim] in `loop`, whose own numbers, if any, are those of the tokens. indices int64 [tokens,
        k]: experts that are chosen already, of which only the weights are wanted."""
        logits, scores = router_scores(x, self.weight, score=self.score)
        if indices is None:
            with torch.no_grad():
                indices = self.choose(scores, loop)
        return Routing(routing_weights(scores, indices, route_scale=self.route_scale), indices, logits, scores)

    def selection_bias(self, loop: LoopIndex) -> Tensor:
        """Makes what is added to the scores for the choice in `loop`: fp32 [n_experts], or [tokens, n_experts]."""
        return selection_bias(self.bias, self.loop_bias, self.loop_updates, loop.value, MIN_ROW_UPDATES)

    def choose(self, scores: Tensor, loop: LoopIndex | None) -> Tensor:
        """Chooses by scores [tokens, n_experts] with the bias in `loop`, or without one: int64 [tokens, k]; inside the
        best groups where routing is limited."""
        limits: dict[str, Any] = {"k": self.k, "n_groups": self.n_groups, "n_limited_groups": self.n_limited_groups}
        if loop is None:
            return best_experts(scores, **limits)
        buffers = self.bias, self.loop_bias, self.loop_updates
        return biased_choice(scores, *buffers, loop.value, trusted_updates=MIN_ROW_UPDATES, **limits)


@torch.no_grad()
def update_router_bias(router: Router, counts: Tensor, rate: float) -> None:
    """Moves the router's biases by one balancing step, after an optimizer step.

    counts fp32 [n_loops, n_experts]: tokens per loop and expert over all ranks and micro-batches; rate is u_b. The
    shared bias moves by u_b * sign(mean - load) on the loads summed over loops, each loop's row by u_b/4, row-centred.
    """
    total = counts.sum(0)
    shared_rate, row_rate = (rate * share for share in router.bias_shares)
    router.bias.add_(shared_rate * torch.sign(total.mean() - total))
    rows = min(counts.shape[0], router.loop_bias.shape[0])
    own = counts[:rows]
    table = router.loop_bias[:rows]
    table.add_(row_rate * torch.sign(own.mean(-1, keepdim=True) - own))
    table.sub_(table.mean(-1, keepdim=True))
    router.loop_updates[:rows] += 1
