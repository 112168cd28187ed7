"""The sorted mixture of experts against boolean masks; empty experts; determinism; row permutations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels.permute import inverse_permutation, permute_rows, repeat_permute_rows
from mythos_ds.model.context import AuxLoss, ForwardContext
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from tests.helpers.reference_layers import Loop, Pass, moe
from tests.helpers.toy_model import gradient, toy_config


def layer(**changes: Any) -> tuple[MoE, ForwardContext]:
    """A layer with random w2 (they start at zero), and the context of one forward."""
    config = toy_config(n_shared_experts=1, **changes)
    module = MoE(config, Initializer(5))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.zeros(2, 30, dtype=torch.int64)
    return module, MythosModel(config).make_context(tokens, None, None, 1)


def run(module: MoE, context: ForwardContext, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a weighted sum of it, those of x included."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, 0, context)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {"x": x.grad, **{name: value.grad for name, value in module.named_parameters()}}
    assert all(value is not None for value in gradients.values())
    return out.detach(), {name: value.clone() for name, value in gradients.items() if value is not None}


@pytest.mark.parametrize("k", [1, 2, 8])
def test_sorted_equals_masked(k: int) -> None:
    config = toy_config(n_experts_per_tok=k)
    module, context = layer(n_experts_per_tok=k)
    x = torch.randn(2, 30, config.dim)
    out, gradients = run(module, context, x)

    params = {f"m.{name}": value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    x = x.double().requires_grad_()
    loop = Loop(0, torch.ones(2, 30, dtype=torch.bool), {}, has_gradient=True)
    expected = moe(params, "m", config, x, 0, loop, None, Pass())
    (expected * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert torch.allclose(out.double(), expected, atol=1e-6)
    for name, got in gradients.items():
        want = gradient(x if name == "x" else params[f"m.{name}"])
        if name == "router.weight" and k == 1:  # a single weight is always 1
            assert got.norm() < 1e-5
            continue
        assert (got - want).norm() <= 1e-5 * want.norm(), name


def test_experts_without_tokens() -> None:
    module, context = layer()
    module.router.bias[3:5] = 10.0  # all tokens choose these two
    out, gradients = run(module, context, torch.randn(2, 30, 32))
    assert out.isfinite().all()
    assert context.records.routing[0][0].counts.tolist() == [0, 0, 0, 60, 60, 0, 0, 0]
    for name in ("experts.w1", "experts.w2", "experts.w3"):
        used = gradients[name].flatten(1).norm(dim=1) > 0
        assert used.tolist() == [False, False, False, True, True, False, False, False]


def test_bitwise_determinism() -> None:
    module, context = layer()
    x = torch.randn(2, 30, 32)
    first, second = run(module, context, x), run(module, context, x)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    module, context = layer()
    x = torch.randn(2, 30, 32)
    order = torch.randperm(30)
    assert torch.allclose(module(x, 0, context)[:, order], module(x[:, order], 0, context), atol=1e-6)


def test_halted_positions_count_nowhere() -> None:
    module, _ = layer()
    config = toy_config()
    tokens = torch.zeros(2, 30, dtype=torch.int64)
    context = MythosModel(config).make_context(tokens, None, AuxLoss(balance=1.0, z=1.0), 1)
    alive = torch.ones(2, 30, dtype=torch.bool)
    alive[:, 20:] = False
    x = torch.randn(2, 30, 32)
    own = context.records.routing[0]
    module(x, 0, context, alive)
    masked = own[0]
    module(x[:, :20], 0, context)
    short = own[0]
    assert torch.equal(masked.counts, short.counts)
    for name in ("balance", "z"):
        got, want = getattr(masked, name), getattr(short, name)
        assert torch.allclose(got, want, rtol=1e-5), name
    module(x, 0, context, torch.zeros_like(alive))
    assert own[0].counts.sum() == 0
    assert own[0].z == 0


def test_record_details() -> None:
    module, context = layer()
    context = replace(context, records=ForwardRecords(details=True))
    own = context.records.routing[0]
    x = torch.randn(2, 30, 32)
    module(x, 0, context)
    assert own[0].prebias_counts is not None
    assert torch.equal(own[0].prebias_counts, own[0].counts), "no bias yet"
    assert own[0].overlap_previous is None
    module.router.bias[0] = 10.0
    module(x, 1, context)
    record = own[1]
    assert record.counts[0] == 60
    assert record.prebias_counts is not None
    assert record.entropy is not None
    assert torch.equal(record.prebias_counts, own[0].counts)
    assert 0 < record.entropy <= torch.log(torch.tensor(8.0))
    module(x, 2, context)
    assert own[2].overlap_previous == 1, "same input, same choice"


def test_permutations_have_the_right_gradient() -> None:
    index = torch.randperm(12)
    inverse = inverse_permutation(index)
    rows = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    few = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute_rows(permute_rows(rows, index, inverse), inverse, index), rows)
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, index, inverse), rows)
    assert torch.autograd.gradcheck(lambda x: repeat_permute_rows(x, index, inverse, 3), few)
    assert torch.equal(repeat_permute_rows(few, index, inverse, 3), few.repeat_interleave(3, 0)[index])
