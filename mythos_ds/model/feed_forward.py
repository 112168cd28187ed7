"""SwiGLU feed-forward (Shazeer 2020), dense and stacked over experts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mythos_ds.model.initializer import Initializer, Linear

_GROUP_ROWS = 8


class FeedForward(nn.Module):
    """Dense SwiGLU w2(silu(w1 x) * w3 x): [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, init: Initializer, std: float):
        super().__init__()
        self.w1 = Linear(dim, hidden, init.at("w1"), std)
        self.w2 = Linear(hidden, dim, init.at("w2"), 0.0)
        self.w3 = Linear(dim, hidden, init.at("w3"), std)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """Stacked SwiGLU experts; holds the experts first_expert .. first_expert + n_experts - 1 of the layer.

    w1 (gate) and w3 (up) are [n_experts, hidden, dim], w2 (down) is [n_experts, dim, hidden].
    """

    def __init__(self, n_experts: int, dim: int, hidden: int, init: Initializer, std: float, first_expert: int = 0):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(n_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.zeros(n_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.zeros(n_experts, hidden, dim))
        for local in range(n_experts):
            init.normal_(self.w1.data[local], "w1", std, expert=first_expert + local)
            init.normal_(self.w3.data[local], "w3", std, expert=first_expert + local)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [n, dim] sorted by expert, counts int64 [n_experts] (local) -> [n, dim]."""
        if grouped_matmul_is_fast(rows, self.w1.shape[1]):
            return _grouped_swiglu(rows, counts, self.w1, self.w2, self.w3)
        return _looped_swiglu(rows, counts.tolist(), self.w1, self.w2, self.w3)


def grouped_matmul_is_fast(rows: Tensor, hidden: int) -> bool:
    """Whether torch's grouped matmul has a fused kernel here: bf16 on CUDA, compute capability 8.0 and up, and widths
    of whole 16-byte units."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    if rows.shape[1] % 8 or hidden % 8:
        return False
    return torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _grouped_swiglu(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    padded, ends, places = _align_groups(rows, counts)
    gate = torch._grouped_mm(padded, w1.transpose(-2, -1), offs=ends)
    up = torch._grouped_mm(padded, w3.transpose(-2, -1), offs=ends)
    results = torch._grouped_mm(functional.silu(gate) * up, w2.transpose(-2, -1), offs=ends)
    return results.index_select(0, places)


def _align_groups(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, dim] with each expert's group padded to a multiple of 8 rows, the groups' ends int32, and where each row
    went int64 [n]. The kernels want groups of 16 bytes in the weight gradient; empty groups stay empty.

    The buffer's size does not depend on the counts, so nothing waits for them; rows past the last end are unused.
    """
    n = rows.shape[0]
    aligned = (counts + _GROUP_ROWS - 1) // _GROUP_ROWS * _GROUP_ROWS
    shift = (aligned.cumsum(0) - aligned) - (counts.cumsum(0) - counts)
    places = torch.arange(n, device=rows.device) + shift.repeat_interleave(counts, output_size=n)
    buffer = rows.new_zeros(n + _GROUP_ROWS * len(counts), rows.shape[1])
    return buffer.index_copy(0, places, rows), aligned.cumsum(0).to(torch.int32), places


def _looped_swiglu(rows: Tensor, counts: Sequence[int], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    # unbind, not w[e]: each select zero-fills the whole stack in backward, O(E^2).
    # Experts without tokens take part too: every rank's graph must hold the same collectives.
    outputs = [
        functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
        for x, gate, down, up in zip(rows.split(counts), w1.unbind(0), w2.unbind(0), w3.unbind(0), strict=True)
    ]
    return torch.cat(outputs)
