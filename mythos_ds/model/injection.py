"""Stable input injection h' = A h + B e + ..., diagonal and per channel (Parcae, arXiv 2604.12946; OpenMythos).

A and B are computed in fp32 whatever the parameters' dtype. A is capped below 1: in bf16, 1 - 1e-4 would round to 1.
rho(A) < 1 bounds the linear part only; the block's Jacobian is another matter.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.injection import inject, injection_coefficients

FLOAT32_CAP = 1.0 - 1e-4
BFLOAT16_CAP = 1.0 - 2.0**-8
INITIAL_DT = 0.805
"""A = exp(-0.805) = sqrt(1/5) at the start (Parcae)."""


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
        self.constants: dict[str, Any] = {
            "discretisation": self.discretisation, "min_log_rate": self.min_log_rate, "state_dtype": self.state_dtype,
        }  # fmt: skip
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
        return injection_coefficients(*self._own(), **self.constants)

    def _own(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.log_A, self.log_dt if self.discretisation == "direct" else self.dt_bias, self.B

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Computes A h + B e in fp32; h in the state's dtype and e in the compute dtype, both [batch, seq, dim]."""
        return inject(h, e, *self._own(), **self.constants)
