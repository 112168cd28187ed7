"""Products that stay fp32: digits, gradients, and the same result on the way of each kind of device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels import float32_product
from mythos_ds.kernels.float32_product import add_product, float32_linear, product
from tests.helpers.toy_model import gradient


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 24, 700), (300, 40, 9000), (7, 600_000, 3)], ids=str)
def test_bf16_operands_lose_nothing_but_the_order_of_additions(rows: int, inner: int, columns: int) -> None:
    x, weight = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    exact = x.double() @ weight.double().T
    found = product(x, weight)
    assert found.dtype == torch.float32
    assert error(found, exact) <= 1e-5
    assert error((x @ weight.T).float(), exact) > 1e-3, "torch's own rounds to bf16"


def test_sums_of_products_are_not_rounded_in_between() -> None:
    total, exact = torch.zeros(5000, 24), torch.zeros(5000, 24, dtype=torch.float64)
    for _ in range(20):
        delta, x = torch.randn(64, 5000).bfloat16(), torch.randn(64, 24).bfloat16()
        assert add_product(total, delta, x) is total
        exact += delta.double().T @ x.double()
    assert error(total, exact) <= 1e-6


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()


def _wide_addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.bfloat16
    return total.addmm_(a.float(), b.float())


@pytest.mark.parametrize("kernels", [("_mm",), ("_mm", "_addmm")], ids=str)
def test_with_the_kernels_of_a_gpu(kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that do what torch says of `mm` and `addmm` with `out_dtype`, which CPUs have not."""
    x, weight, delta = (torch.randn(shape).bfloat16() for shape in ((30, 16), (70, 16), (30, 70)))
    expected = product(x, weight), add_product(torch.ones(70, 16), delta, x)
    stand_ins: dict[str, Any] = {"_mm": _wide_mm, "_addmm": _wide_addmm}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(float32_product, name, stand_in)
    monkeypatch.setattr(float32_product, "_runs", lambda kernel, device: kernel in [stand_ins[k] for k in kernels])
    found = product(x, weight), add_product(torch.ones(70, 16), delta, x)
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-5)


def test_what_a_device_can_do_is_tried() -> None:
    for kernel in (float32_product._mm, float32_product._addmm):
        assert float32_product._runs(kernel, "meta")
        assert not float32_product._runs(kernel, "cpu"), "the way of CPUs may go"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((3, 50, 16), (200, 16)))
    out, scale = float32_linear(x, weight), torch.randn(3, 50, 200)
    (out * scale).sum().backward()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    (wide_x @ wide_weight.T * scale).sum().backward()
    assert (out.shape, out.dtype) == ((3, 50, 200), torch.float32)
    for found, exact in ((x, wide_x), (weight, wide_weight)):
        assert gradient(found).dtype == dtype
        assert error(gradient(found), gradient(exact)) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_products_stay_fp32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 16).to(dtype), torch.randn(20, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float32_linear(x, weight).dtype == torch.float32
        assert product(x[0], weight).dtype == torch.float32


def test_a_single_position_has_logits() -> None:
    assert float32_linear(torch.randn(16).bfloat16(), torch.randn(20, 16).bfloat16()).shape == (20,)
