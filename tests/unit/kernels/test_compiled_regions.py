"""Regions compiled by the inductor for the CPU give what they give as written: slow, each is a call of a C++ compiler.

What is compared is the whole model, so that every region is run with the arguments that it gets.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels.norm import add_rms_norm
from mythos_ds.kernels.regions import compile_regions, compiler_problem
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.mythos import MythosModel
from tests.helpers.toy_model import MLA, gradient, randomise, toy_batch, toy_config

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
LOSS, GRADIENT = 1e-6, 5e-6
"""fp32: relative to the loss, and to a gradient's largest element."""
NO_FARTHER = 1.2
"""bf16: distance from fp32, compiled over as written."""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler for the inductor")


@pytest.fixture
def _inductor(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Regions compiled for the CPU; no processes of the inductor's own stay behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        compile_regions("inductor")
        yield
        compile_regions(None)


def step(dtype: torch.dtype, changes: dict[str, Any], n_loops: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a drawn model, whose weights are bf16's also in fp32."""
    config = toy_config(**changes)
    model = randomise(MythosModel(config, activation_checkpointing="loop"))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    loss = model(**toy_batch(config), n_loops=n_loops, n_grad_loops=2, aux=AuxLoss(0.1, 0.1))
    loss.backward()
    return loss.detach(), {name: gradient(parameter) for name, parameter in model.named_parameters()}


def distance(value: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted element."""
    return float((value.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-30))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MLA, {"injection": "post", "router_score": "softmax"}], ids=str)
def test_fp32_is_the_same_to_rounding(changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    loss, wanted = step(torch.float32, changes)
    request.getfixturevalue("_inductor")
    for n_loops in (3, 2):  # the second time other graphs are at hand
        found, gradients = step(torch.float32, changes, n_loops)
        if n_loops == 3:
            assert float(found) == pytest.approx(float(loss), rel=LOSS)
            for name, value in wanted.items():
                assert distance(gradients[name], value) < GRADIENT, name


@pytest.mark.slow
def test_bf16_is_no_farther_from_fp32_than_as_written(request: pytest.FixtureRequest) -> None:
    """Summed over parameters: single ones vary by chance. The experts chosen are those of the same scores."""
    _, exact = step(torch.float32, MLA)
    _, plain = step(torch.bfloat16, MLA)
    request.getfixturevalue("_inductor")
    _, compiled = step(torch.bfloat16, MLA)
    far = [sum(distance(own[name], value) for name, value in exact.items()) for own in (compiled, plain)]
    assert far[0] <= NO_FARTHER * far[1]
    assert far[0] > 0


@pytest.mark.usefixtures("_inductor")
def test_one_region_in_fp32_and_bf16() -> None:
    """In the default suite; the others are slow."""
    weight, branch = torch.randn(16), torch.randn(5, 16)
    for x, added in ((torch.randn(5, 16), branch), (torch.randn(9, 16), torch.randn(9, 16))):
        want = add_rms_norm.__wrapped__(x, added, weight, eps=1e-5)  # type: ignore[attr-defined]
        for value, wanted in zip(add_rms_norm(x, added, weight, eps=1e-5), want, strict=True):
            assert distance(value, wanted) < 1e-6


def test_a_compiler_is_found() -> None:
    assert compiler_problem(torch.device("cpu")) is None
