"""The injection of a loop's input into its state, h' = A h + B e + ..., diagonal and per channel, in fp32."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.regions import region

_MAX_LOG_RATE = math.log(30.0)
_DIRECT_LIMIT = 20.0
_THETA = 10000.0


class _ClampInward(torch.autograd.Function):
    """clamp whose gradient is stopped only where a step would lead further out: no channel gets stuck at a bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def injection_coefficients(
    log_a: Tensor, dt: Tensor, b: Tensor, *, discretisation: str, min_log_rate: float, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes the diagonals of A (dtype of the state) and of B (fp32), each [dim], in fp32 whatever the parameters'
    dtype: A = exp(-rate) with log rate = log softplus(dt) + log_a, at least min_log_rate.

    `direct`: dt is one log dt for all channels, and B itself is b. Else B is dt b ("euler"), or zero-order hold's.
    """
    if discretisation == "direct":
        log_rate = (dt.float() + log_a.float()).clamp(-_DIRECT_LIMIT, _DIRECT_LIMIT)
        return torch.exp(-log_rate.exp()).to(state_dtype), b.float()
    dt_bias = dt.float()
    dt = functional.softplus(dt_bias)
    # log softplus(x) = x to fp32 accuracy below -16; the plain formula would give log 0.
    log_dt = torch.where(dt_bias < -16.0, dt_bias, dt.clamp_min(1e-30).log())
    log_rate = _ClampInward.apply(log_dt + log_a.float(), min_log_rate, _MAX_LOG_RATE)
    rate = log_rate.exp()
    decay = torch.exp(-rate).to(state_dtype)
    gain = dt if discretisation == "euler" else dt * (-torch.expm1(-rate) / rate)
    return decay, gain * b.float()


@region
def inject(
    h: Tensor,
    e: Tensor,
    log_a: Tensor,
    dt: Tensor,
    b: Tensor,
    *,
    discretisation: str,
    min_log_rate: float,
    state_dtype: torch.dtype,
) -> Tensor:
    """Computes A h + B e in fp32; h in the state's dtype and e in any, both [..., dim]. The rest: see
    `injection_coefficients`."""
    decay, gain = injection_coefficients(
        log_a, dt, b, discretisation=discretisation, min_log_rate=min_log_rate, state_dtype=state_dtype
    )
    return (decay * h).float() + gain * e.float()


def sinusoid(index: Tensor | int, width: int, device: torch.device) -> Tensor:
    """Computes [sin(t f_i), cos(t f_i)] with f_i = 10000^(-2i/width) of the index t (Vaswani et al. 2017): a number, or
    numbers [batch].

    fp32 [width], or [batch, 1, width]; an odd width has no last cosine."""
    half = (width + 1) // 2
    channel = torch.arange(width, device=device)  # all of them at once: parts that are put together are kernels each
    exponent = (channel % half * 2).float() / width
    frequency = torch.pow(torch.full_like(exponent, _THETA), -exponent)
    angle = index[:, None, None] * frequency if isinstance(index, Tensor) else frequency * index
    return torch.where(channel < half, angle.sin(), angle.cos())


@region
def scaled_sinusoid(gain: Tensor, index: Tensor | int) -> Tensor:
    """Computes the gain [width] times the `sinusoid` of a loop's index: fp32 [width], or [batch, 1, width]."""
    return gain.float() * sinusoid(index, gain.shape[0], gain.device)
