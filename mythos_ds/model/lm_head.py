"""The language-model head: logits or the mean loss."""

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.cross_entropy import chunked_cross_entropy
from mythos_ds.kernels.float32_product import float32_linear
from mythos_ds.model.initializer import Initializer


class LMHead(nn.Module):
    """The map from hidden states to logits or loss; `weight` is the embedding's where the two are tied."""

    def __init__(self, config: ModelConfig, init: Initializer, tied: nn.Parameter | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.dim)) if tied is None else tied
        if tied is None:
            init.normal_(self.weight.data, "weight", config.resolved_init_std)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, divisor: float | None = None) -> Tensor:
        """Maps hidden [..., dim] to fp32 logits [..., vocab], or with targets int64 [...] to the scalar mean loss; with
        a divisor to the sum of losses over it."""
        if targets is None:
            return float32_linear(hidden, self.weight)
        return chunked_cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), divisor)
