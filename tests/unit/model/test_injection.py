"""The linear part of the loop is stable: rho(A) stays below its cap whatever the parameters, in the state's dtype."""

import math

import pytest
import torch

from mythos_ds.model.injection import BFLOAT16_CAP, FLOAT32_CAP, Injection
from tests.helpers.toy_model import gradient, toy_config

VALUES = (-1e4, -300.0, -100.0, -30.0, -16.0, -5.0, -1.0, 0.0, 1.0, 5.0, 16.0, 30.0, 100.0, 300.0, 1e4)
CAPS = {"float32": FLOAT32_CAP, "bfloat16": BFLOAT16_CAP}
GRID = torch.cartesian_prod(torch.tensor(VALUES), torch.tensor(VALUES))


def injection(state_dtype: str, discretisation: str = "euler") -> Injection:
    """One channel for each pair of log_A and dt_bias on the grid."""
    module = Injection(toy_config(dim=len(GRID), state_dtype=state_dtype, discretisation=discretisation))
    with torch.no_grad():
        module.log_A.copy_(GRID[:, 0])
        module.dt_bias.copy_(GRID[:, 1])
    return module


def slowest(state_dtype: str) -> torch.Tensor:
    """The largest A that any parameters give, a scalar in the state's dtype."""
    return injection(state_dtype).decay().amax()


def test_the_caps_are_those_of_the_dtypes() -> None:
    assert FLOAT32_CAP == 1 - 1e-4
    assert BFLOAT16_CAP == 1 - 2**-8
    assert torch.tensor(FLOAT32_CAP).bfloat16() == 1, "why a bf16 state needs its own cap"


@pytest.mark.parametrize("state_dtype", CAPS)
@pytest.mark.parametrize("discretisation", ["euler", "zoh"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_spectral_radius_and_gradients(state_dtype: str, discretisation: str, parameter_dtype: torch.dtype) -> None:
    module = injection(state_dtype, discretisation).to(parameter_dtype)
    decay = module.decay()
    assert decay.dtype == getattr(torch, state_dtype)
    assert decay.isfinite().all()
    assert (decay >= 0).all()
    assert decay.double().amax() <= CAPS[state_dtype]
    assert decay.double().amax() > CAPS[state_dtype] - 1e-3, "the cap is reached, not undercut by far"

    h = torch.randn(2, 3, len(GRID)).to(getattr(torch, state_dtype)).requires_grad_()
    e = torch.randn(2, 3, len(GRID), requires_grad=True)
    new = module(h, e)
    assert new.dtype == torch.float32
    new.sum().backward()
    for tensor in (new, h.grad, e.grad, *(parameter.grad for parameter in module.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_a_channel_at_the_cap_can_leave_it() -> None:
    module = injection("float32")
    decay = module.decay()
    at_cap = decay >= decay.amax()
    decay.sum().backward()  # descent makes A smaller: off the cap
    assert module.log_A.grad is not None
    assert (module.log_A.grad[at_cap] < 0).all()
    module.log_A.grad = None
    (-module.decay()).sum().backward()  # and this pushes against it
    against = gradient(module.log_A)
    assert (against[at_cap & (decay == decay.amax())] >= 0).all()
    clamped = GRID.sum(1) < -40
    assert (against[clamped] == 0).all()


def test_free_running_state_shrinks_in_bfloat16() -> None:
    # Every positive normal number but the smallest, 0x0080: half a unit below it rounds back, which is underflow.
    bits = torch.arange(0x0081, 0x7F80, dtype=torch.int16)
    h = bits.view(torch.bfloat16)
    decay = slowest("bfloat16")
    assert decay.dtype == torch.bfloat16
    assert (decay * h < h).all()


def test_free_running_state_shrinks_in_float32() -> None:
    decay = slowest("float32")
    mantissas = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)  # all of [1, 2)
    for scale in (1.0, 2.0**-126, 2.0**127):
        h = mantissas * scale
        assert (decay * h < h).all()


@pytest.mark.parametrize(("state_dtype", "loops"), [("float32", 3000), ("bfloat16", 300)])
def test_the_module_itself_shrinks_a_state_without_input(state_dtype: str, loops: int) -> None:
    module = injection(state_dtype)
    h = torch.full((1, 1, len(GRID)), 1e3, dtype=getattr(torch, state_dtype))
    nothing = torch.zeros(1, 1, len(GRID))
    tiny = 1e-30
    with torch.no_grad():
        for _ in range(loops):
            new = module(h, nothing).to(h.dtype)
            assert ((new < h) | (h < tiny)).all()
            h = new
    assert h.amax() <= 1e3 * (CAPS[state_dtype] + 1e-7) ** loops * 1.7


@pytest.mark.parametrize("discretisation", ["euler", "zoh"])
def test_formulas_away_from_the_bounds(discretisation: str) -> None:
    module = Injection(toy_config(discretisation=discretisation))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    rate = torch.nn.functional.softplus(module.dt_bias.double()) * module.log_A.double().exp()
    decay, gain = module.coefficients()
    assert torch.allclose(decay.double(), torch.exp(-rate), rtol=1e-6)
    if discretisation == "euler":
        expected = torch.nn.functional.softplus(module.dt_bias.double()) * module.B.double()
    else:
        expected = (1 - torch.exp(-rate)) / module.log_A.double().exp() * module.B.double()
    assert torch.allclose(gain.double(), expected, rtol=1e-5)


def test_first_value() -> None:
    decay = Injection(toy_config()).decay()
    assert torch.allclose(decay, torch.full_like(decay, math.exp(-0.805)), rtol=1e-6)


def test_direct_form_does_not_reach_one() -> None:
    module = Injection(toy_config(discretisation="direct"))
    with torch.no_grad():
        module.log_A.fill_(-1e4)
    assert torch.isfinite(module.decay()).all()
    assert (module.decay() <= 1).all()  # OpenMythos's own clamp; fp32 rounds exp(-e^-20) to 1
