"""Which attention kernel runs: flash-attn where a working one is installed, else torch's own; all compute the same.

The installed packages are written into a folder, with plain torch inside in place of kernels.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels import attention
from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.segments import DocumentBounds
from tests.unit.kernels.test_attention import positions_of

POSITIONS = positions_of((3, 1, 4), (8,), (4, 4))
WORKING = """
from tests.unit.kernels.test_flash_packages import CALLS, by_sequence, by_bounds


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    assert causal
    CALLS.append((__name__, "one"))
    return {one}


def flash_attn_varlen_func(
    q, k, v, {first}cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False,
):
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    CALLS.append((__name__, "documents"))
    return {several}
"""
ONE, SEVERAL = "by_sequence(q, k, v, softmax_scale)", "by_bounds(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)"
VERSION_2 = WORKING.format(one=ONE, several=SEVERAL, first="")
VERSION_3 = WORKING.format(one=f"{ONE}, None", several=f"{SEVERAL}, None", first="")
VERSION_4 = WORKING.format(one=f"{ONE}, None", several=f"{SEVERAL}, None", first="qv=None, ")

CALLS: list[tuple[str, str]] = []
TORCH_VARLEN = attention._torch_varlen


def by_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of q [batch, seq, heads, width], written out."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * scale
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype), v)


def by_bounds(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """The same of q [tokens, heads, width], document by document."""
    assert bounds.dtype == torch.int32
    assert longest == int(bounds.diff().max())
    parts = zip(*(x.split(bounds.diff().tolist()) for x in (q, k, v)), strict=True)
    return torch.cat([by_sequence(own_q[None], own_k[None], own_v[None], scale)[0] for own_q, own_k, own_v in parts])


class Installed:
    """Finds top-level packages in a folder only: what is installed, as far as flash-attn goes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("flash_attn"):
            return None
        return PathFinder.find_spec(name, [str(self.folder)] if path is None else path)


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a file of a package; afterwards no flash-attn is known any more."""

    def forget() -> None:
        TORCH_VARLEN.cache_clear()
        attention._flash_attention.cache_clear()
        attention._working.cache_clear()
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            del sys.modules[name]

    def written(file: str, text: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    forget()
    CALLS.clear()
    monkeypatch.setattr(sys, "meta_path", [Installed(tmp_path), *sys.meta_path])
    yield written
    forget()


def on_device(monkeypatch: pytest.MonkeyPatch, major: int | None) -> None:
    """Tensors of the CPU are taken for 16-bit ones of a GPU."""
    monkeypatch.setattr(attention, "_flash_capability", lambda q: major)


def attend(documents: DocumentBounds | None, width: int = 8, v_width: int = 8) -> list[Tensor]:
    """Output and gradients of drawn tensors; grouped heads."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 8, 4, width), (3, 8, 2, width), (3, 8, 2, v_width)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    out = causal_attention(q, k, v, scale=0.3, documents=documents)
    assert out.shape == (3, 8, 4, v_width)
    upstream = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, (q, k, v), upstream)]


@pytest.mark.parametrize(
    ("major", "files", "used"),
    [
        (8, {"flash_attn/__init__.py": VERSION_2}, "flash_attn"),
        (9, {"flash_attn/__init__.py": VERSION_2}, "flash_attn"),
        (9, {"flash_attn_interface.py": VERSION_3}, "flash_attn_interface"),
        (9, {"flash_attn_interface.py": VERSION_2, "flash_attn/__init__.py": VERSION_2}, "flash_attn_interface"),
        (10, {"flash_attn_interface.py": VERSION_3, "flash_attn/__init__.py": VERSION_2}, "flash_attn"),
        (9, {"flash_attn/cute/__init__.py": VERSION_4}, "flash_attn.cute"),
        (10, {"flash_attn/cute/__init__.py": VERSION_4, "flash_attn/__init__.py": VERSION_2}, "flash_attn.cute"),
        (9, {"flash_attn_interface.py": VERSION_3, "flash_attn/cute/__init__.py": VERSION_4}, "flash_attn_interface"),
        (8, {"flash_attn/cute/__init__.py": VERSION_4, "flash_attn/__init__.py": VERSION_2}, "flash_attn"),
    ],
)
@pytest.mark.parametrize("v_width", [8, 5])
def test_an_installed_package_is_used(
    major: int, files: dict[str, str], used: str, v_width: int, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for documents, kind in ((None, "one"), (DocumentBounds.from_positions(POSITIONS), "documents")):
        want = attend(documents, v_width=v_width)
        assert CALLS == []
        for file, text in files.items():
            install(file, text)
        with monkeypatch.context() as patched:
            on_device(patched, major)
            got = attend(documents, v_width=v_width)
        assert [(used, kind)] == CALLS
        CALLS.clear()
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("major", "files", "told"),
    [
        (8, {"flash_attn/cute/__init__.py": VERSION_4}, "no flash_attn_func"),
        (8, {"flash_attn/__init__.py": "def flash_attn_func(): pass"}, "has no flash_attn_varlen_func"),
        (8, {"flash_attn/__init__.py": "raise ImportError('undefined symbol: _ZN3c104cuda')"}, "undefined symbol"),
        (9, {"flash_attn_interface.py": "raise OSError('libcudart.so.12')"}, "libcudart"),
    ],
    ids=["version 4 on Ampere", "half of it", "built for another torch", "built for another CUDA"],
)
@pytest.mark.parametrize("documents", [None, DocumentBounds.from_positions(POSITIONS)], ids=["one", "documents"])
def test_a_broken_package_is_named_once_and_not_used(
    major: int,
    files: dict[str, str],
    told: str,
    documents: DocumentBounds | None,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    want = attend(documents)
    for file, text in files.items():
        install(file, text)
    on_device(monkeypatch, major)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: None)
    with caplog.at_level(logging.WARNING, "mythos_ds"):
        results = [attend(documents) for _ in range(3)]
    for got in results:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(caplog.messages) == 1
    assert told in caplog.messages[0]
    assert next(iter(files)).split("/")[0].removesuffix(".py") in caplog.messages[0]


def test_a_broken_third_version_leaves_the_second(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash_attn_interface.py", "raise ImportError('no kernel image')")
    install("flash_attn/__init__.py", VERSION_2)
    on_device(monkeypatch, 9)
    attend(None)
    assert CALLS == [("flash_attn", "one")]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Stands for torch's; equal numbers of heads, as the first torch to have it wanted."""
    assert scale is not None
    assert (window_size, cu_seq_q is cu_seq_k, max_q == max_k) == ((-1, 0), True, True)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    CALLS.append(("torch", "documents"))
    return by_bounds(query, key, value, cu_seq_q, max_q, scale)


def with_grouped_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The form of torch 2.13."""
    assert (window_size, cu_seq_q is cu_seq_k, max_q == max_k, enable_gqa) == ((-1, 0), True, True, True)
    assert scale is not None
    assert query.shape[1] == 2 * key.shape[1] == 2 * value.shape[1]
    CALLS.append(("torch", "documents"))
    return by_bounds(query, key, value, cu_seq_q, max_q, scale)


def without_scale(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """The form of torch 2.10."""
    assert (is_causal, cu_seq_q is cu_seq_k, max_q == max_k) == (True, True, True)
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]
    CALLS.append(("torch", "documents"))
    return by_bounds(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5)


@pytest.mark.parametrize("form", [varlen_attn, with_grouped_heads, without_scale])
@pytest.mark.parametrize(("width", "used"), [(8, True), (12, False)])
def test_torch_has_a_kernel_for_documents(
    form: Callable[..., Tensor], width: int, used: bool, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of widths of whole 16-byte units; without flash-attn. In whatever form this torch has it."""
    documents = DocumentBounds.from_positions(POSITIONS)
    want = attend(documents, width, v_width=7)
    on_device(monkeypatch, 9)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", form)
    TORCH_VARLEN.cache_clear()
    got = attend(documents, width, v_width=7)
    assert [("torch", "documents")] * used == CALLS
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    CALLS.clear()
    attend(None)
    assert CALLS == []


def test_version_4_takes_the_values_of_latent_attention_as_they_are(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192 and 128 channels; other widths are made one."""
    seen, compute = [], by_sequence

    def record(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append(v.shape[-1])
        return compute(q, k, v, scale)

    monkeypatch.setattr("tests.unit.kernels.test_flash_packages.by_sequence", record)
    on_device(monkeypatch, 10)
    for file, text, widths in (
        ("flash_attn/__init__.py", VERSION_2, [192, 96]),
        ("flash_attn/cute/__init__.py", VERSION_4, [128, 96]),
    ):
        install(file, text)
        attention._flash_attention.cache_clear()
        attention._working.cache_clear()
        for width, v_width in ((192, 128), (96, 64)):
            attend(None, width, v_width)
        assert seen == widths
        seen.clear()


def test_this_torch_takes_what_is_given() -> None:
    function = attention._torch_varlen()
    if function is None:
        pytest.skip("this torch has no attention of sequences of different lengths, or an earlier form of it")
    tensors = [torch.empty(0)] * 5
    newer = "window_size" in inspect.signature(function).parameters
    options: dict[str, Any] = {"scale": 1.0, "window_size": (-1, 0)} if newer else {"is_causal": True}
    inspect.signature(function).bind(*tensors, 8, 8, **options)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "major"),
    [
        ("cuda", torch.bfloat16, 192, (9, 0), 9),
        ("cuda", torch.float16, 256, (8, 6), 8),
        ("cuda", torch.bfloat16, 64, (12, 0), 12),
        ("cuda", torch.bfloat16, 264, (9, 0), None),
        ("cuda", torch.float32, 64, (9, 0), None),
        ("cuda", torch.bfloat16, 64, (7, 5), None),
        ("cpu", torch.bfloat16, 64, (9, 0), None),
    ],
)
def test_what_flash_kernels_take(
    device: str,
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    major: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnDevice(Tensor):
        is_cuda = device == "cuda"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = torch.empty(1, 2, 1, width, dtype=dtype).as_subclass(OnDevice)
    assert attention._flash_capability(q) == major
