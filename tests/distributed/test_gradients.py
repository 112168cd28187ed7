"""Gradients of bf16 weights: added up over loops and averaged over ranks in fp32, and what that makes of a run."""

from types import SimpleNamespace

import pytest
import torch

from mythos_ds.config.resolve import resolve
from mythos_ds.engine import gradient_dtype
from mythos_ds.engine.gradient_dtype import add_up_in_float32, require_float32_sums
from mythos_ds.engine.optimizer import require_cpu_adam
from mythos_ds.errors import ConfigError, ParallelError
from tests.distributed.cases import toy_run
from tests.distributed.gradient_cases import BF16, LAYOUTS
from tests.helpers.distributed import run_distributed

MODULE = "tests.distributed.gradient_cases"
TIMEOUT_S = 300.0
ROUNDED_ONCE = 2.1e-3
"""Relative error of a sum of numbers that were each rounded to bf16 (1.7e-3), and of one that is rounded itself."""


@pytest.fixture(scope="module")
def measured():
    """What each of two ranks measured in `gradient_cases.precision`."""
    return run_distributed(f"{MODULE}:precision", 2, TIMEOUT_S)


def test_gradients_are_averaged_in_fp32_in_both_groups(measured):
    """Those of weights that all ranks share, and those of experts."""
    for rank in measured:
        for case, found in zip([*LAYOUTS, {"ep": 1, "pp": 2}], rank["types"], strict=True):
            assert {kind for _, _, kind in found["reductions"]} <= {"torch.float32", "torch.float64"}, case
            sizes = {size for _, size, kind in found["reductions"] if kind == "torch.float32"}
            assert sizes == ({1} if "pp" in case else {2} if case["ep"] == 1 else {1, 2}), case


def test_the_deepspeed_section_may_choose_another_type(measured):
    for rank in measured:
        kinds = {kind for name, _, kind in rank["own_choice"]["reductions"] if name == "reduce_scatter_tensor"}
        assert kinds == {"torch.bfloat16"}


def test_a_pipeline_keeps_its_gradients_in_fp32_until_they_are_reduced(measured):
    for ring in (rank["types"][-1] for rank in measured):
        assert ring["gradients"] == ["torch.float32"]
        assert {kind for name, _, kind in ring["reductions"] if name == "reduce_scatter_tensor"} == {"torch.float32"}


def test_gradients_of_looped_weights_add_up_in_fp32(measured):
    """Under every ZeRO stage; stage 2 rounds the sum to bf16 once, and in bf16 each loop rounds it."""
    for rank in measured:
        zero, one, two, three = rank["errors"]
        assert max(zero, one, three) <= 1e-6
        assert two <= ROUNDED_ONCE
        assert rank["error_in_bf16"] > 1.5 * ROUNDED_ONCE


def test_a_torch_without_fp32_gradients_is_refused(monkeypatch):
    """Unless the run asks for no such thing."""
    monkeypatch.setattr(gradient_dtype, "torch", SimpleNamespace(Tensor=object, __version__="2.8.0"))
    with pytest.raises(ConfigError, match=r"nearest: training\.grad_dtype=bfloat16") as raised:
        require_float32_sums(toy_run({**BF16, "ep": 1, "stage": 3}, 1).training)
    assert raised.value.problems[0].code == "MDS730"
    require_float32_sums(toy_run({**BF16, "ep": 1, "stage": 3, "training": {"grad_dtype": "bfloat16"}}, 1).training)
    require_float32_sums(toy_run({"ep": 1, "stage": 3}, 1).training)


def test_an_optimizer_offloaded_from_a_gpu_needs_a_compiler(monkeypatch, tmp_path):
    """Told before anything is built; with nvcc, on a CPU and for an optimizer that is not compiled there is no need."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    offloads = toy_run({"ep": 1, "stage": 3, "offload": "optimizer"}, 1)
    gpu = torch.device("cuda", 0)
    with pytest.raises(ParallelError, match="CUDA_HOME = the folder") as raised:
        require_cpu_adam(offloads, gpu)
    assert raised.value.code == "MDS731"
    require_cpu_adam(offloads, torch.device("cpu"))
    require_cpu_adam(toy_run({"ep": 1, "stage": 3}, 1), gpu)
    require_cpu_adam(toy_run({"ep": 1, "stage": 3, "offload": "optimizer", "optimizer": "sgd"}, 1), gpu)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    require_cpu_adam(offloads, gpu)


@pytest.mark.parametrize("common", [0.0, 0.3])
def test_an_average_over_a_thousand_ranks_keeps_its_digits(common):
    """A ring adds one rank's part after the other in the type that DeepSpeed is told; bf16 gives 4 and 14 % here."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    resolved = resolve(toy_run({**BF16, "ep": 1, "stage": 3}, 1), 1)
    errors = {}
    for name in (resolved.deepspeed["communication_data_type"], "bf16"):
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(20_000, generator=generator)
        exact, ring = torch.zeros(20_000, dtype=torch.float64), torch.zeros(20_000, dtype=types[name])
        for _ in range(1024):
            own = (1 - common) * torch.randn(20_000, generator=generator) + common * shared
            part = own.bfloat16().to(types[name]) / 1024  # of a bf16 gradient, divided first as DeepSpeed does
            exact += own.bfloat16().double() / 1024
            ring += part
        errors[name] = ((ring.double() - exact).norm() / exact.norm()).item()
    assert errors["fp32"] <= 1e-3
    assert errors["bf16"] > 2e-2


def test_losses_in_bf16_are_those_of_one_process(measured):
    (one,) = run_distributed(f"{MODULE}:losses_of_one", 1, TIMEOUT_S)
    assert one[-1] < 0.9 * one[0]
    for name in ("losses", "ring_losses"):
        assert all(rank[name] == measured[0][name] for rank in measured)
        assert measured[0][name] == pytest.approx(one, rel=2e-3), name


@pytest.mark.parametrize("loops", [8, 32])
def test_a_sum_over_loops_is_as_good_as_one_in_fp32_that_is_rounded_once(loops):
    generator = torch.Generator().manual_seed(loops)
    inputs = torch.randn(loops, 128, 64, generator=generator).bfloat16()
    upstream = torch.randn(loops, 128, 64, generator=generator).bfloat16()
    exact = torch.einsum("lbo,lbi->oi", upstream.double(), inputs.double())

    def error(*, in_float32: bool) -> float:
        weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
        if in_float32:
            add_up_in_float32([weight])
        torch.autograd.backward([x @ weight.t() for x in inputs], list(upstream))
        assert weight.grad is not None
        return ((weight.grad.double() - exact).norm() / exact.norm()).item()

    once = ((exact.bfloat16().double() - exact).norm() / exact.norm()).item()
    assert error(in_float32=True) <= 1.02 * once
    assert error(in_float32=False) > 2 * once
