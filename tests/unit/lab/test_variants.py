"""Variants of the block: against formulas, and against the model where they start as it."""

from typing import Any

import pytest
import torch

from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.lab.variants import CONTROLS
from mythos_ds.model.mythos import MythosModel

CONFIG = configuration(base("cpu")).model
TOKENS = torch.arange(24).view(2, 12) * 7 % CONFIG.vocab_size


def _model(control: str | None = None) -> MythosModel:
    model = MythosModel(CONFIG, seed=4)
    if control is not None:
        CONTROLS[control](model)
    with torch.no_grad():  # output projections start at zero, which would hide the layers
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "mix" not in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("control", ["jacobian_penalty", "shared_bias", "loop_bias"])
def test_variants_that_change_training_only_leave_the_forward_alone(control: str) -> None:
    with torch.no_grad():
        plain, changed = (_same_weights(name)(TOKENS, n_loops=3) for name in (None, control))
    assert torch.equal(plain, changed)


def _same_weights(control: str | None) -> MythosModel:
    model = MythosModel(CONFIG, seed=4)
    if control is not None:
        CONTROLS[control](model)
    return model.eval()


def test_streams_start_as_the_model() -> None:
    with torch.no_grad():
        plain, streams = (_same_weights(name)(TOKENS, n_loops=4) for name in (None, "streams_2"))
    assert torch.allclose(plain, streams, atol=1e-6)


@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_every_parameter_of_a_variant_gets_a_gradient(control: str) -> None:
    model = _model(control)
    model(TOKENS, n_loops=3, targets=TOKENS).backward()
    unused = {"addition": (), "concat": (), "decayed_no_input": ("injection.B",)}.get(control, ())
    for name, parameter in model.named_parameters():
        if not name.endswith(tuple(unused)) or not unused:
            assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("addition", lambda module, h, e: h + e),
        ("concat", lambda module, h, e: h @ module.weight[:, :64].t() + e @ module.weight[:, 64:].t()),
        ("no_input", lambda module, h, e: h),
        ("decayed_no_input", lambda module, h, e: module.injection.decay() * h),
    ],
)
def test_injections_follow_their_formulas(control: str, expected) -> None:
    model = _model(control)
    h, e = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    module = model.recurrent.injection
    assert torch.allclose(module(h, e), expected(module, h, e), atol=1e-5)
    assert model.recurrent.starts_from_e == ("no_input" in control)


def test_the_penalty_is_the_squared_gain_of_one_more_loop() -> None:
    """With an identity as the loop the gain is 1, and the loss grows by nothing but its gradient is the weight's."""
    model = _same_weights("jacobian_penalty").train()
    penalised = model.recurrent
    scale = torch.nn.Parameter(torch.tensor(3.0))
    block: Any = penalised.block
    block.step = lambda h, e, **options: (scale * h, None)
    h = torch.ones(1, 4, 64, requires_grad=True)
    block.forward = lambda e, n_loops, context: h
    context = model.make_context(torch.zeros(1, 4, dtype=torch.int64), None, None, 1)
    penalised(h.detach(), 1, context).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(0.1 * 2 * 3.0, rel=1e-4)  # d/ds of 0.1 s^2
