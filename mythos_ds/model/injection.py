"""Stable input injection h' = A h + B e + ..., diagonal and per channel (Parcae, arXiv 2604.12946; OpenMythos).

A and B are computed in fp32 whatever the parameters' dtype. A is capped below 1: in bf16, 1 - 1e-4 would round to 1.
rho(A) < 1 bounds the linear part only; the block's Jacobian is another matter.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mythos_ds.config.schema import ModelConfig

FLOAT32_CAP = 1.0 - 1e-4
BFLOAT16_CAP = 1.0 - 2.0**-8
INITIAL_DT = 0.805
"""A = exp(-0.805) = sqrt(1/5) at the start (Parcae)."""

_MAX_LOG_RATE = math.log(30.0)
_DIRECT_LIMIT = 20.0


class _ClampInward(torch.autograd.Function):
    """clamp whose gradient is stopped only where a step would lead further out: no channel gets stuck at a bound."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def decay_cap(state_dtype: str) -> float:
    """Returns the largest value of A for a state carried in `state_dtype`."""
    return BFLOAT16_CAP if state_dtype == "bfloat16" else FLOAT32_CAP


class Injection(nn.Module):
    """A = exp(-dt exp(log_A)) with dt = softplus(dt_bias); B by Euler (dt B) or zero-order hold.

    `direct` is OpenMythos's form: one log dt for all channels, B itself learned.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.discretisation = config.discretisation
        self.state_dtype = torch.bfloat16 if config.state_dtype == "bfloat16" else torch.float32
        # The margin keeps fp32 rounding of exp below the cap.
        self.min_log_rate = math.log(-math.log(decay_cap(config.state_dtype)) * 1.002)
        self.log_A = nn.Parameter(torch.zeros(config.dim))
        if config.discretisation == "direct":
            self.log_dt = nn.Parameter(torch.zeros(1))
            self.B = nn.Parameter(torch.full((config.dim,), 0.1))
        else:
            self.dt_bias = nn.Parameter(torch.full((config.dim,), math.log(math.expm1(INITIAL_DT))))
            self.B = nn.Parameter(torch.ones(config.dim))

    def decay(self) -> Tensor:
        """Computes the diagonal of A in the dtype of the state, [dim]; its maximum is rho(A)."""
        return self.coefficients()[0]

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Computes the diagonals of A (dtype of the state) and of B (fp32), each [dim]."""
        if self.discretisation == "direct":
            log_rate = (self.log_dt.float() + self.log_A.float()).clamp(-_DIRECT_LIMIT, _DIRECT_LIMIT)
            return torch.exp(-log_rate.exp()).to(self.state_dtype), self.B.float()
        dt_bias = self.dt_bias.float()
        dt = functional.softplus(dt_bias)
        # log softplus(x) = x to fp32 accuracy below -16; the plain formula would give log 0.
        log_dt = torch.where(dt_bias < -16.0, dt_bias, dt.clamp_min(1e-30).log())
        log_rate = _ClampInward.apply(log_dt + self.log_A.float(), self.min_log_rate, _MAX_LOG_RATE)
        rate = log_rate.exp()
        decay = torch.exp(-rate).to(self.state_dtype)
        gain = dt if self.discretisation == "euler" else dt * (-torch.expm1(-rate) / rate)
        return decay, gain * self.B.float()

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Computes A h + B e in fp32; h in the state's dtype and e in the compute dtype, both [batch, seq, dim]."""
        decay, gain = self.coefficients()
        return (decay * h).float() + gain * e.float()
