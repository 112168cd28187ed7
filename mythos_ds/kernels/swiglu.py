"""The gate of SwiGLU (Shazeer 2020)."""

from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.regions import region


@region
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) * up, of one shape."""
    return functional.silu(gate) * up
