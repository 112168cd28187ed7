"""Values narrower than queries, as of latent attention: which back end of torch's is asked for them, and how."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mythos_ds.kernels import attention
from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from tests.unit.kernels.test_attention import positions_of
from tests.unit.kernels.test_flash_packages import by_sequence

WIDTH, V_WIDTH = 24, 16


class Torch:
    """Stands for torch on a GPU: back ends that can, and the calls that come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, able: set[str]):
        self.asked = 0
        self.calls: list[tuple[int, SDPBackend | None]] = []
        self._current: SDPBackend | None = None
        for name in ("cudnn", "flash", "efficient"):
            monkeypatch.setattr(attention, f"can_use_{name}_attention", self._answer(name, able))
        monkeypatch.setattr(attention, "sdpa_kernel", self._only)
        monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", self._attend)
        monkeypatch.setattr(attention, "_BACKENDS", {})
        monkeypatch.setattr(attention, "_flash_capability", lambda q: None)

    def _answer(self, name: str, able: set[str]) -> Any:
        def answer(params: Any) -> bool:
            self.asked += 1
            one_width = params.value.shape[-1] == params.query.shape[-1]
            return name in able and (one_width or name != "flash")

        return answer

    def _only(self, backend: SDPBackend) -> "Torch":
        self._current = backend
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._current = None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        assert is_causal
        self.calls.append((v.shape[-1], self._current))
        q, k, v = (x.as_subclass(Tensor).transpose(1, 2) for x in (q, k, v))
        return by_sequence(q, k, v, scale).transpose(1, 2)


class OnGPU(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def tensors(heads: int = 4) -> list[Tensor]:
    """q, k and v, with grouped heads."""
    generator = torch.Generator().manual_seed(2)
    shapes = (3, 8, heads, WIDTH), (3, 8, 2, WIDTH), (3, 8, 2, V_WIDTH)
    return [torch.randn(shape, generator=generator).as_subclass(OnGPU) for shape in shapes]


@pytest.mark.parametrize(
    ("able", "width", "backend"),
    [
        ({"cudnn", "flash", "efficient"}, V_WIDTH, SDPBackend.CUDNN_ATTENTION),
        ({"cudnn"}, V_WIDTH, SDPBackend.CUDNN_ATTENTION),
        ({"flash", "efficient"}, WIDTH, None),
        ({"efficient"}, V_WIDTH, SDPBackend.EFFICIENT_ATTENTION),
        (set(), WIDTH, None),
    ],
    ids=["all", "cuDNN", "flash", "efficient", "none"],
)
def test_values_are_padded_only_for_kernels_that_want_one_width(
    able: set[str], width: int, backend: SDPBackend | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors()
    want = by_sequence(q.as_subclass(Tensor), k.as_subclass(Tensor), v.as_subclass(Tensor), 0.3)
    gpu = Torch(monkeypatch, able=able)
    for _ in range(2):
        out = causal_attention(q, k, v, scale=0.3, documents=None)
        assert out.shape == (3, 8, 4, V_WIDTH)
        assert torch.allclose(out.as_subclass(Tensor), want, atol=1e-5)
    assert gpu.calls == [(width, backend)] * 2
    asked = gpu.asked
    assert 1 <= asked <= 3
    causal_attention(*tensors(heads=2), scale=0.3, documents=None)
    assert gpu.asked > asked  # another kind of call


def test_one_width_and_the_cpu_ask_no_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    gpu = Torch(monkeypatch, able={"cudnn"})
    causal_attention(q, k, k, scale=0.3, documents=None)
    causal_attention(*(x.as_subclass(Tensor) for x in (q, k, v)), scale=0.3, documents=None)
    assert gpu.asked == 0
    assert gpu.calls == [(WIDTH, None)] * 2


def test_documents_one_after_the_other_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would make a plan for each of many shapes."""
    documents = DocumentBounds.from_positions(positions_of((3, 5), (8,), (4, 4)))
    gpu = Torch(monkeypatch, able={"cudnn"})
    out = causal_attention(*tensors(), scale=0.3, documents=documents)
    assert out.shape == (3, 8, 4, V_WIDTH)
    assert {call for call in gpu.calls} == {(WIDTH, None)}
    assert gpu.asked == 0


def test_gradients_of_padded_values_are_those_of_the_formula() -> None:
    """On this machine's own kernels."""
    q, k, v = (x.as_subclass(Tensor).requires_grad_() for x in tensors())
    upstream = torch.randn(3, 8, 4, V_WIDTH, generator=torch.Generator().manual_seed(3))
    out = causal_attention(q, k, v, scale=0.3, documents=None)
    want = torch.autograd.grad(by_sequence(q, k, v, 0.3), (q, k, v), upstream)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), upstream), want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
