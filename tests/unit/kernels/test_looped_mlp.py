"""The loop over experts with its gradients written out equals plain torch, bit for bit where a call stands alone and
where a graph has many."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.gradient_sums import GradientSums
from mythos_ds.kernels.looped_mlp import looped_swiglu
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Initializer

DIM, HIDDEN = 24, 40
COUNTS = {"odd": [3, 0, 17, 4, 0, 1], "one": [0, 0, 70, 0, 0, 0], "none": [0] * 6, "even": [16] * 6}
LOOPS = 3


def plain(rows: Tensor, counts: list[int], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Expert by expert, its gradients torch's own."""
    return torch.cat(
        [
            functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
            for x, gate, down, up in zip(rows.split(counts), w1.unbind(0), w2.unbind(0), w3.unbind(0), strict=True)
        ]
    )


def tensors(n: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = (n, DIM), (experts, HIDDEN, DIM), (experts, DIM, HIDDEN), (experts, HIDDEN, DIM)
    rows, *weights = (torch.randn(shape, generator=generator).mul(0.3).to(dtype).requires_grad_() for shape in shapes)
    return rows, weights


def run(kind: str, counts: list[list[int]], dtype: torch.dtype, grad_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of as many calls as there are counts, one after the other."""
    rows, weights = tensors(sum(counts[0]), len(counts[0]), dtype)
    for weight in weights:
        if grad_dtype is not None:
            weight.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    sums = GradientSums.of(*weights) if kind == "summed" else None
    x = rows
    for own in counts:
        x = x + (plain(x, own, *weights) if kind == "plain" else looped_swiglu(x, own, *weights, sums=sums))
    x.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(6)).to(dtype))
    made: list[Any] = [x.detach(), rows.grad, *(weight.grad for weight in weights)]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("kind", ["alone", "summed"])
def test_results_and_gradients_are_those_of_plain_torch_to_the_bit(name: str, dtype: torch.dtype, kind: str) -> None:
    counts = COUNTS[name]
    different = [counts, counts[::-1], counts[1:] + counts[:1]]
    for got, want in zip(run(kind, different, dtype), run("plain", different, dtype), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another type")
@pytest.mark.parametrize("kind", ["alone", "summed"])
def test_gradients_add_up_in_the_type_that_they_should(kind: str) -> None:
    counts = [COUNTS["odd"], COUNTS["odd"][::-1]]
    got, want = (run(which, counts, torch.bfloat16, torch.float32) for which in (kind, "plain"))
    assert [x.dtype for x in got[2:]] == [torch.float32] * 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_loop_makes_one_gradient_and_touches_the_experts_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for three gradients, whatever the number of loops; an expert that no loop used gets zeros."""
    rows, weights = tensors(8, 6, torch.float32)
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def record(shape: Any, **options: Any) -> Tensor:
        made.append(tuple(shape))
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", record)
    sums, x = GradientSums.of(*weights), rows
    for _ in range(LOOPS):
        x = looped_swiglu(x, [0, 5, 0, 3, 0, 0], *weights, sums=sums)
    x.sum().backward()
    assert sorted(made) == sorted(tuple(weight.shape) for weight in weights)
    for weight in weights:
        assert weight.grad is not None
        assert [bool(own.any()) for own in weight.grad] == [False, True, False, True, False, False]


def test_a_second_backward_of_a_graph_begins_anew() -> None:
    """Also after a backward that asked for the gradient of the rows alone, and after one that broke off."""
    rows, weights = tensors(8, 2, torch.float32)
    sums = GradientSums.of(*weights)
    broken = rows * 1.0
    out = looped_swiglu(looped_swiglu(broken, [5, 3], *weights, sums=sums), [4, 4], *weights, sums=sums).sum()
    want = torch.autograd.grad(out, weights, retain_graph=True)
    (alone,) = torch.autograd.grad(out, rows, retain_graph=True)

    def fail(_grad: Tensor) -> None:
        raise RuntimeError("broken off")

    handle = broken.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        torch.autograd.grad(out, rows, retain_graph=True)
    handle.remove()
    again = torch.autograd.grad(out, [rows, *weights])
    assert all(torch.equal(a, b) for a, b in zip(again, [alone, *want], strict=True))


def test_frozen_weights_get_no_gradient() -> None:
    rows, weights = tensors(8, 2, torch.float32)
    weights[1].requires_grad_(False)
    looped_swiglu(rows, [5, 3], *weights).sum().backward()
    assert [weight.grad is not None for weight in weights] == [True, False, True]
    with torch.no_grad():
        assert not looped_swiglu(rows, [5, 3], *weights).requires_grad


def test_experts_add_up_while_they_are_told_to() -> None:
    experts = Experts(2, DIM, HIDDEN, Initializer(0), 0.3, out_std=0.3)
    rows, _ = tensors(8, 2, torch.float32)
    counts = torch.tensor([5, 3])
    experts(experts(rows, counts), counts).sum().backward()
    want = [parameter.grad for parameter in experts.parameters()]
    experts.zero_grad(set_to_none=True)
    with experts.adding_up():
        out = experts(experts(rows, counts), counts)
        assert experts._sums is not None
    assert experts._sums is None
    out.sum().backward()
    for parameter, gradient in zip(experts.parameters(), want, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_weights_may_be_computed() -> None:
    rows, weights = tensors(5, 2, torch.float32)
    looped_swiglu(rows, [2, 3], *(w * 1.0 for w in weights)).sum().backward()
    plain_rows, plain_weights = tensors(5, 2, torch.float32)
    plain(plain_rows, [2, 3], *plain_weights).sum().backward()
    for w, wanted in zip(weights, plain_weights, strict=True):
        assert torch.equal(w.grad, wanted.grad)  # type: ignore[arg-type]


def test_a_gradient_of_the_gradient_is_refused_and_not_left_out() -> None:
    rows, weights = tensors(5, 2, torch.float32)
    loss = looped_swiglu(rows, [2, 3], *weights).sum()
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(loss, weights, create_graph=True)
