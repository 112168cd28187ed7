"""Products of 16-bit matrices that are added up in fp32 and stay fp32, as logits and sums of gradients have to.

GPUs have a kernel for it (torch's `mm` and `addmm` with `out_dtype`). Elsewhere the operands are made fp32 block by
block, which is the same mathematics: a product of two bf16 numbers is exact in fp32.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 18
"""Elements of the larger operand that are fp32 at once: few enough to stay in a processor's cache."""


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        delta = grad.to(x.dtype)
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        return delta @ weight, add_product(total, delta, x).to(weight.dtype)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x weight^T in fp32, with gradients in the types of the operands. x [..., n], weight [m, n]."""
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight).float()  # autocast makes it bf16
    return _Float32Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x weight^T in fp32, without a gradient. x [rows, n], weight [m, n], of one type."""
    if weight.dtype == torch.float32:
        return (x @ weight.t()).float()
    if _runs(_mm, weight.device.type):
        return _mm(x, weight.t())
    wide, out = x.float(), torch.empty(x.shape[0], weight.shape[0], device=x.device)
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        torch.mm(wide, weight[start : start + rows].float().t(), out=out[:, start : start + rows])
    return out


def add_product(total: Tensor, delta: Tensor, x: Tensor) -> Tensor:
    """Adds delta^T x to the fp32 `total`, and returns it. total [m, n], delta [rows, m], x [rows, n], of one type."""
    if delta.dtype == torch.float32:
        total += delta.t() @ x
    elif _runs(_addmm, total.device.type):
        _addmm(total, delta.t(), x)
    elif _runs(_mm, total.device.type):
        total += _mm(delta.t(), x)
    else:
        wide, columns = x.float(), max(1, _BLOCK // max(1, x.shape[0]))
        for start in range(0, delta.shape[1], columns):
            total[start : start + columns] += delta[:, start : start + columns].float().t() @ wide
    return total


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@cache
def _runs(kernel: Callable[..., Tensor], device: str) -> bool:
    """Whether this torch has a kernel for the device; versions differ in what they take, so it is tried."""
    square = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    before = (torch.zeros(8, 8, device=device),) if kernel is _addmm else ()
    try:
        kernel(*before, square, square)
    except torch.OutOfMemoryError:  # a RuntimeError too, and no answer
        raise
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
