"""Document bounds from position resets, and attention inside them against an explicit mask."""

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from tests.helpers.reference_layers import attend


def positions_of(*rows: tuple[int, ...]) -> Tensor:
    """Positions int64 [batch, seq] of sequences given by the lengths of their documents."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_bounds() -> None:
    bounds = DocumentBounds.from_positions(positions_of((3, 1, 4), (8,), (4, 4)))
    assert bounds is not None
    assert bounds.cu_seqlens.tolist() == [0, 3, 4, 8, 16, 20, 24]
    assert bounds.cu_seqlens.dtype == torch.int32
    assert bounds.runs == ((1, 1), (1, 3), (3, 4), (1, 8))
    assert torch.equal(bounds.order[bounds.inverse], torch.arange(24))


def test_one_document_per_sequence_needs_no_bounds() -> None:
    assert DocumentBounds.from_positions(positions_of((8,), (8,))) is None
    assert DocumentBounds.from_positions(positions_of((8,), (8,)) + 5) is None


@pytest.mark.parametrize("documents", [((3, 1, 4), (8,), (4, 4)), ((1,) * 8, (8,), (7, 1))], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("v_width", [3, 6, 9])
def test_attention_equals_an_explicit_mask(documents: tuple[tuple[int, ...], ...], kv_heads: int, v_width: int) -> None:
    positions = positions_of(*documents)
    q = torch.randn(3, 8, 4, 6, requires_grad=True)
    k = torch.randn(3, 8, kv_heads, 6, requires_grad=True)
    v = torch.randn(3, 8, kv_heads, v_width, requires_grad=True)
    bounds = DocumentBounds.from_positions(positions)
    got = causal_attention(q, k, v, scale=0.3, documents=bounds)

    number = (positions == 0).cumsum(1)
    visible = torch.ones(8, 8).tril().bool() & (number[:, :, None] == number[:, None, :])
    repeats = 4 // kv_heads
    wide_k, wide_v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    want = attend(q, wide_k, wide_v, visible[:, None], 0.3)
    assert torch.allclose(got.flatten(2), want, atol=1e-6)
    upstream = torch.randn_like(want)
    got_gradients = torch.autograd.grad(got.flatten(2), (q, k, v), upstream)
    want_gradients = torch.autograd.grad(want, (q, k, v), upstream)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
