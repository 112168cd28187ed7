"""The chunked cross-entropy: torch's value and gradients, without ever holding all logits."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_ds.kernels import cross_entropy
from mythos_ds.kernels.cross_entropy import chunked_cross_entropy
from mythos_ds.plan.live_bytes import LiveBytes
from tests.helpers.toy_model import gradient


class LargestTensor(TorchDispatchMode):
    """Notes the largest element count that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize(("tokens", "vocab"), [(5, 11), (256, 5000), (257, 5000), (700, 5000), (4000, 300)], ids=str)
def test_value_and_gradients_equal_torch(tokens: int, vocab: int) -> None:
    hidden = torch.randn(tokens, 24, requires_grad=True)
    weight = torch.randn(vocab, 24, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    loss = chunked_cross_entropy(hidden, weight, targets)
    (3.0 * loss).backward()
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = functional.cross_entropy(wide_hidden @ wide_weight.T, targets)
    (3.0 * expected).backward()
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 1e-6 * expected
    for got, want in ((gradient(hidden), gradient(wide_hidden)), (gradient(weight), gradient(wide_weight))):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_divisor_divides_the_sum() -> None:
    """Also that of no tokens at all, whose gradients are zero."""
    hidden, weight = torch.randn(300, 24), torch.randn(5000, 24, requires_grad=True)
    targets = torch.randint(0, 5000, (300,))
    for tokens in (300, 7, 0):
        weight.grad = None
        loss = chunked_cross_entropy(hidden[:tokens].requires_grad_(), weight, targets[:tokens], 12.5)
        loss.backward()
        wide = weight.detach().double().requires_grad_()
        logits = hidden[:tokens].detach().double() @ wide.T
        expected = functional.cross_entropy(logits, targets[:tokens], reduction="sum") / 12.5
        expected.backward()
        assert abs(loss - expected) <= 1e-6 * expected
        assert (gradient(weight) - gradient(wide)).norm() <= 1e-5 * gradient(wide).norm()


def test_bfloat16_gradients_are_close() -> None:
    hidden = torch.randn(900, 32).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(3000, 32)).bfloat16().requires_grad_()
    targets = torch.randint(0, 3000, (900,))
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward()
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = functional.cross_entropy(wide_hidden @ wide_weight.T, targets)
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 1e-6 * expected, "logits are not rounded to bf16"
    for got, want in ((gradient(hidden), gradient(wide_hidden)), (gradient(weight), gradient(wide_weight))):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_a_gradient_in_bfloat16_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the weight is added up over chunks and rounded at the end alone."""
    hidden, weight = torch.randn(4000, 32).bfloat16(), (0.3 * torch.randn(5000, 32)).bfloat16()
    targets, found = torch.randint(0, 50, (4000,)), []
    for rows in (256, 4000):
        monkeypatch.setattr(cross_entropy, "_MIN_CHUNK_ROWS", rows)
        own = weight.clone().requires_grad_()
        chunked_cross_entropy(hidden, own, targets).backward()
        found.append(gradient(own).double())
    assert (found[0] - found[1]).norm() <= 3e-4 * found[1].norm()


def test_no_two_chunks_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four chunks the most bytes are those of one: fp32 logits, the weight's gradient and the rows' gradients."""
    monkeypatch.setattr(cross_entropy, "_MIN_CHUNK_ROWS", 1000)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 1})
    hidden, weight = torch.randn(4000, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    live = LiveBytes(existing=False)
    with live:
        live.ignore(hidden, weight)
        chunked_cross_entropy(hidden, weight, torch.randint(0, 50, (4000,)))
    chunk = 4 * 1000 * 5000
    assert chunk <= live.peak <= 1.1 * chunk


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((3, 8), 1e3, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    targets = (hidden @ weight.T).argmax(-1)
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.isfinite()
    assert gradient(hidden).isfinite().all()
    assert gradient(weight).isfinite().all()


def test_without_gradient_the_value_is_the_same() -> None:
    hidden, weight, targets = torch.randn(600, 16), torch.randn(4000, 16), torch.randint(0, 4000, (600,))
    with torch.no_grad():
        quiet = chunked_cross_entropy(hidden, weight, targets)
    assert torch.equal(quiet, chunked_cross_entropy(hidden.requires_grad_(), weight, targets))
    assert not quiet.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_of_all_logits(grad: bool) -> None:
    tokens, vocab, dim = 4096, 2048, 16
    hidden = torch.randn(tokens, dim, requires_grad=grad)
    weight = torch.randn(vocab, dim, requires_grad=grad)
    targets = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as largest:
        loss = chunked_cross_entropy(hidden, weight, targets)
        if grad:
            loss.backward()
    assert 0 < largest.numel <= 1 << 20
    with LargestTensor() as all_logits:
        functional.cross_entropy(hidden @ weight.T, targets)
    assert all_logits.numel == tokens * vocab, "the measurement sees what it should"
