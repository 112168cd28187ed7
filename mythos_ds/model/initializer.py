"""Weight initialisation that does not depend on how the model is cut.

Every tensor is drawn by a counter-based generator keyed by (seed, logical parameter name, global expert id): the same
values result with one process, with sharded experts, and under DeepSpeed's `zero.Init` (which replaces torch's own
constructors, hence numpy).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Initializer:
    """Draws weights for the module called `prefix`; with seed None it leaves them as they are, to be loaded."""

    seed: int | None
    prefix: str = ""

    def at(self, name: str | int) -> "Initializer":
        """The initializer of the child module `name`."""
        return Initializer(self.seed, f"{self.prefix}.{name}" if self.prefix else str(name))

    @torch.no_grad()
    def normal_(self, tensor: Tensor, name: str, std: float, *, expert: int | None = None) -> None:
        """Fills `tensor` with N(0, std^2); `expert` is the global id where the tensor is one expert's slice."""
        if tensor.is_meta or self.seed is None:
            return
        key = f"{self.seed}:{self.prefix}.{name}" + ("" if expert is None else f"[{expert}]")
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
            block = flat[start : start + _BLOCK_ELEMENTS]
            values = generator.standard_normal(block.numel(), dtype=np.float32) * np.float32(std)
            block.copy_(torch.from_numpy(values))


class Linear(nn.Module):
    """Matrix, with a bias that starts at zero where asked: [..., in_features] -> [..., out_features]; std 0 makes it a
    zero map.

    Weights are filled inside `__init__`: under `zero.Init` a parameter is already cut up when `__init__` returns.
    """

    def __init__(self, in_features: int, out_features: int, init: Initializer, std: float, *, biased: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if biased else None
        if std > 0:
            init.normal_(self.weight.data, "weight", std)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token embedding: int64 [batch, seq] -> [batch, seq, dim]."""

    def __init__(self, vocab_size: int, dim: int, init: Initializer, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim))
        init.normal_(self.weight.data, "weight", std)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)
