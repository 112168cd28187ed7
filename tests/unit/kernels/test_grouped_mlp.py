"""The grouped matmul and the loop over experts are one function; the kernel only runs fused on a GPU."""

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels.grouped_mlp import grouped_swiglu, looped_swiglu
from tests.helpers.toy_model import gradient

DIM, HIDDEN = 16, 24


def _run(grouped: bool, counts: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(counts), DIM), (4, HIDDEN, DIM), (4, DIM, HIDDEN), (4, HIDDEN, DIM)]
    rows, w1, w2, w3 = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    weights = (w1, w2, w3)
    out = grouped_swiglu(rows, torch.tensor(counts), *weights) if grouped else looped_swiglu(rows, counts, *weights)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), *(gradient(x) for x in (rows, w1, w2, w3))]


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped matmul")
@pytest.mark.parametrize("counts", [[3, 0, 9, 4], [16, 0, 0, 1], [8, 8, 8, 8], [0, 0, 0, 0]])
def test_grouped_equals_looped_with_gradients(counts: list[int]) -> None:
    for grouped, looped in zip(_run(True, counts), _run(False, counts), strict=True):
        assert grouped.shape == looped.shape
        assert torch.allclose(grouped, looped, atol=1e-5)
