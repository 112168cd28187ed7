"""The grouped matmul and the loop over experts are one function; the kernel only runs fused on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_ds.kernels import grouped_mlp
from mythos_ds.kernels.gradient_sums import GradientSums
from mythos_ds.kernels.grouped_mlp import grouped_matmul_is_fast, grouped_swiglu
from mythos_ds.kernels.looped_mlp import looped_swiglu
from tests.helpers.toy_model import gradient

DIM, HIDDEN = 16, 24
NAMES = ("out", "rows", "w1", "w2", "w3")
DEVICES = pytest.mark.parametrize("device", ["hopper", "hopper before torch 2.10", "blackwell"])
GROUPED = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped matmul")


def _run(kind: str, counts: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients, in float64; the numbers drawn are those of `dtype` whatever they are computed in."""
    generator = torch.Generator().manual_seed(3)
    n = len(counts)
    shapes = [(sum(counts), DIM), (n, HIDDEN, DIM), (n, DIM, HIDDEN), (n, HIDDEN, DIM), (sum(counts), DIM)]
    *tensors, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if kind == "loop":
        tensors, upstream = [x.double() for x in tensors], upstream.double()
    rows, *weights = (x.requires_grad_() for x in tensors)
    if kind == "loop":
        out = looped_swiglu(rows, counts, *weights)
    else:
        out = grouped_swiglu(rows, torch.tensor(counts), *weights)
    (out * upstream).sum().backward()
    results = [out.detach(), *(gradient(x) for x in (rows, *weights))]
    return {name: value.double() for name, value in zip(NAMES, results, strict=True)}


class GPU(TorchDispatchMode):
    """Leaves NaN where a GPU leaves memory as it was: in new tensors, in rows past the last group of a grouped product,
    and, as Blackwell does, in the weight gradients of groups without rows. Refuses what kernels refuse: rows past the
    end or, with `padded`, a group that is no whole 16 bytes or ends with the buffer; and no rows at all."""

    def __init__(self, *, blackwell: bool, padded: bool):
        super().__init__()
        self.blackwell, self.padded = blackwell, padded
        self.products = self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return out.fill_(float("nan")) if out.is_floating_point() else out
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            self.products += 1
            ends: Tensor = (kwargs or {}).get("offs", args[-1])
            a, b = args[:2]
            sizes = ends.diff(prepend=ends.new_zeros(1))
            assert ends.dtype == torch.int32
            assert not self.padded or not (sizes % 8).any()
            if out.dim() == 2:
                assert len(out) > 0
                assert ends[-1] < len(out) if self.padded else ends[-1] == len(out)
                assert a.stride(-1) == 1
                self.rows = max(self.rows, len(out))
                out[int(ends[-1]) :] = float("nan")
            else:
                # Columns of the one, rows of the other: of those a group may have any size.
                assert a.stride(0) == 1
                assert b.stride(1) == 1
                if self.blackwell:
                    out[sizes == 0] = float("nan")
        return out


def on_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Tensors of the CPU are taken for those of a GPU by what depends on which it is."""
    monkeypatch.setattr(grouped_mlp, "_misses_empty_groups", lambda rows: device == "blackwell")
    monkeypatch.setattr(grouped_mlp, "takes_any_groups", lambda rows: device == "hopper" and len(rows) > 0)


def _counts(n: int, seed: int) -> list[int]:
    """Rows of n experts: most have none, some an odd number, one many."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (n,), generator=generator) * (torch.rand(n, generator=generator) < 0.3)
    counts[n // 2] = 70
    counts[-1] = 0
    return [int(count) for count in counts]


@GROUPED
@DEVICES
@pytest.mark.parametrize("counts", [[3, 0, 9, 4], [16, 0, 0, 1], [8, 8, 8, 8], [0, 0, 0, 0], [0, 0, 0, 5]])
def test_grouped_equals_looped_with_gradients(counts: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, device)
    want = _run("loop", counts)
    with GPU(blackwell=device == "blackwell", padded=device != "hopper" or not sum(counts)):
        got = _run("grouped", counts)
    for name in NAMES:
        assert got[name].shape == want[name].shape
        assert (got[name] - want[name]).norm() <= 1e-6 * want[name].norm(), name


@GROUPED
@DEVICES
@pytest.mark.parametrize("n_experts", [4, 17, 1023, 1024])
def test_bfloat16_with_empty_groups_and_memory_that_was_never_written(
    n_experts: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the loop in float64 on the same bf16 numbers: to bf16's rounding; empty experts' gradients are zeros."""
    on_device(monkeypatch, device)
    counts = _counts(n_experts, seed=n_experts)
    want = _run("loop", counts, torch.bfloat16)
    with GPU(blackwell=device == "blackwell", padded=device != "hopper") as gpu:
        got = _run("grouped", counts, torch.bfloat16)
    assert gpu.products == 9
    assert (gpu.rows == sum(counts)) is (device == "hopper")
    empty = torch.tensor(counts) == 0
    assert empty.any()
    for name in NAMES:
        assert got[name].isfinite().all(), name
        assert (got[name] - want[name]).norm() < 1e-2 * want[name].norm(), name
    for name in ("w1", "w2", "w3"):
        assert (got[name][empty] == 0).all(), name


@GROUPED
@DEVICES
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_calls_add_up_in_place(
    grad_dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the type of the weights' gradients: no whole gradient is made but once, and none is added up by autograd."""
    on_device(monkeypatch, device)
    generator = torch.Generator().manual_seed(5)
    shapes = ((4, HIDDEN, DIM), (4, DIM, HIDDEN), (4, HIDDEN, DIM))
    weights = [torch.randn(shape, generator=generator).mul(0.3).to(torch.bfloat16) for shape in shapes]
    parts = [([3, 0, 9, 4], 16), ([0, 0, 1, 0], 1), ([2, 5, 0, 1], 8)]
    rows = [torch.randn(n, DIM, generator=generator).to(torch.bfloat16) for _, n in parts]
    exact = [weight.double().requires_grad_() for weight in weights]
    for (counts, _), part in zip(parts, rows, strict=True):
        looped_swiglu(part.double(), counts, *exact).sum().backward()
    for weight in weights:
        weight.requires_grad_().grad_dtype = grad_dtype
    added: list[str] = []

    class Adds(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 3 and "add" in func._schema.name:
                added.append(str(func.overloadpacket))
            return out

    with GPU(blackwell=device == "blackwell", padded=device != "hopper") as gpu, Adds():
        sums = GradientSums.of(*weights)
        results = [
            grouped_swiglu(part, torch.tensor(counts), *weights, sums=sums)
            for (counts, _), part in zip(parts, rows, strict=True)
        ]
        torch.cat(results).sum().backward()
    assert gpu.products == 9 * len(parts)
    assert added == ["aten.add_"] * 3 * (len(parts) - 1)
    for weight, want in zip(weights, exact, strict=True):
        found, wanted = gradient(weight), gradient(want)
        assert found.dtype == grad_dtype
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


@GROUPED
def test_grouped_weights_may_be_frozen_and_rows_without_gradient() -> None:
    generator = torch.Generator().manual_seed(5)
    w1, w2, w3 = (torch.randn(2, DIM, DIM, generator=generator).to(torch.bfloat16) for _ in range(3))
    rows, counts = torch.randn(8, DIM, generator=generator).to(torch.bfloat16), torch.tensor([5, 3])
    w1.requires_grad_()
    grouped_swiglu(rows, counts, w1, w2, w3).float().sum().backward()
    assert [weight.grad is not None for weight in (w1, w2, w3)] == [True, False, False]
    with torch.no_grad():
        assert not grouped_swiglu(rows, counts, w1, w2, w3).requires_grad


def _rows(capability: tuple[int, int] | None, dtype: torch.dtype, width: int) -> Tensor:
    class OnDevice(Tensor):
        is_cuda = capability is not None

    return torch.empty(4, width, dtype=dtype).as_subclass(OnDevice)


@pytest.mark.parametrize(
    ("capability", "torch_has", "n_experts", "fast"),
    [
        ((9, 0), "both", 1, True),
        ((9, 0), "both", 1023, True),
        ((9, 0), "both", 1024, False),
        ((9, 0), "both", 0, False),
        ((9, 0), "private", 64, True),
        ((9, 0), "none", 64, False),
        ((10, 0), "both", 64, True),
        ((10, 3), "both", 1023, True),
        ((10, 0), "both", 1024, False),
        ((10, 0), "private", 64, False),
        ((8, 0), "both", 64, False),
        ((8, 9), "both", 64, False),
        ((12, 0), "both", 64, False),
        ((11, 0), "both", 64, False),
        (None, "both", 64, False),
    ],
)
def test_where_the_grouped_matmul_is_fused(
    capability: tuple[int, int] | None,
    torch_has: str,
    n_experts: int,
    fast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.8 has a private function, for Hopper alone; from 2.10 on it has a public one, for Blackwell too."""
    for owner, name, having in ((torch, "_grouped_mm", "none"), (functional, "grouped_mm", "none private")):
        if torch_has in having.split():
            monkeypatch.delattr(owner, name, raising=False)
        else:
            monkeypatch.setattr(owner, name, lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped_matmul_is_fast(_rows(capability, torch.bfloat16, DIM), HIDDEN, n_experts) is fast
    assert not grouped_matmul_is_fast(_rows(capability, torch.float32, DIM), HIDDEN, n_experts)
    assert not grouped_matmul_is_fast(_rows(capability, torch.bfloat16, DIM + 4), HIDDEN, n_experts)
    assert not grouped_matmul_is_fast(_rows(capability, torch.bfloat16, DIM), HIDDEN + 4, n_experts)


def test_which_devices_miss_empty_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, misses in (((9, 0), False), ((10, 0), True), ((10, 3), True), (None, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert grouped_mlp._misses_empty_groups(_rows(capability, torch.bfloat16, DIM)) is misses


@pytest.mark.parametrize(
    ("capability", "public", "n", "takes"),
    [
        ((9, 0), True, 4, True),
        ((9, 0), True, 0, False),
        ((9, 0), False, 4, False),
        ((10, 0), True, 4, False),
        (None, True, 4, False),
    ],
)
def test_where_groups_may_have_any_size(
    capability: tuple[int, int] | None, public: bool, n: int, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if public:
        monkeypatch.setattr(functional, "grouped_mm", lambda: None, raising=False)
    else:
        monkeypatch.delattr(functional, "grouped_mm", raising=False)
    assert grouped_mlp.takes_any_groups(_rows(capability, torch.bfloat16, DIM)[:n]) is takes
