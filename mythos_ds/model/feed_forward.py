"""SwiGLU feed-forward (Shazeer 2020), dense and stacked over experts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mythos_ds.kernels.gradient_sums import GradientSums
from mythos_ds.kernels.grouped_mlp import grouped_matmul_is_fast, grouped_swiglu
from mythos_ds.kernels.looped_mlp import looped_swiglu
from mythos_ds.kernels.swiglu import swiglu
from mythos_ds.model.initializer import Initializer, Linear


class FeedForward(nn.Module):
    """Dense SwiGLU w2(silu(w1 x) * w3 x): [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, init: Initializer, std: float, out_std: float = 0.0):
        super().__init__()
        self.w1 = Linear(dim, hidden, init.at("w1"), std)
        self.w2 = Linear(hidden, dim, init.at("w2"), out_std)
        self.w3 = Linear(dim, hidden, init.at("w3"), std)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Experts(nn.Module):
    """Stacked SwiGLU experts; holds the experts first_expert .. first_expert + n_experts - 1 of the layer.

    w1 (gate) and w3 (up) are [n_experts, hidden, dim], w2 (down) is [n_experts, dim, hidden].
    """

    _sums: GradientSums | None = None

    def __init__(
        self,
        n_experts: int,
        dim: int,
        hidden: int,
        init: Initializer,
        std: float,
        first_expert: int = 0,
        out_std: float = 0.0,
    ):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(n_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.zeros(n_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.zeros(n_experts, hidden, dim))
        # Nothing to draw on the meta device or for weights to be loaded: planning does not count experts up.
        for local in range(0 if self.w1.is_meta or init.seed is None else n_experts):
            init.normal_(self.w1.data[local], "w1", std, expert=first_expert + local)
            init.normal_(self.w3.data[local], "w3", std, expert=first_expert + local)
            if out_std > 0:
                init.normal_(self.w2.data[local], "w2", out_std, expert=first_expert + local)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Computes rows [n, dim] sorted by expert, counts int64 [n_experts] (local) -> [n, dim]."""
        if grouped_matmul_is_fast(rows, self.w1.shape[1], self.w1.shape[0]):
            return grouped_swiglu(rows, counts, self.w1, self.w2, self.w3, sums=self._sums)
        return looped_swiglu(rows, counts.tolist(), self.w1, self.w2, self.w3, sums=self._sums)

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """Lets the gradients of all calls meanwhile add up in one place; they have to be of one graph."""
        self._sums = GradientSums.of(self.w1, self.w2, self.w3)
        try:
            yield
        finally:
            self._sums = None
