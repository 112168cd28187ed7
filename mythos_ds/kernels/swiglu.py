"""The gate of SwiGLU (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.regions import region


@region
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) * up, of one shape."""
    return functional.silu(gate) * up


@region
def swiglu_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of gate and up from that of swiglu(gate, up)."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)
