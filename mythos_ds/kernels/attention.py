"""Causal attention inside documents. Bounds are segment lengths, never a dense [seq, seq] mask."""

import importlib
import importlib.util
import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mythos_ds.kernels.permute import permute_rows
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.log import get_logger

_log = get_logger(__name__)

_MAX_FLASH_WIDTH = 256
_VERSION_2, _VERSION_3, _VERSION_4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"
_FLASH_PACKAGES = {9: (_VERSION_3, _VERSION_4, _VERSION_2), 10: (_VERSION_4, _VERSION_2)}
"""Packages of flash-attn by compute capability, the better one first: version 3 is Hopper's. Others: version 2."""
_NATIVE_WIDTHS = {_VERSION_4: (192, 128)}
"""Widths of queries and of values, not the same, that a package has a forward and a backward for."""
_MAX_EQUAL_4 = 128
"""The widest queries with values of their width that version 4 takes on every device."""
_FLASH_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")


class AttentionCore(Protocol):
    """Computes softmax(scale q k^T) v, causal and inside documents; attention layers are given one to call.

    An implementation may use another kernel, other processes' keys or a cache; shapes are those of `causal_attention`.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: DocumentBounds | None
    ) -> Tensor: ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: DocumentBounds | None) -> Tensor:
    """Computes softmax(scale q k^T) v, causal and inside documents, on one device: the default AttentionCore.

    q [batch, seq, heads, width], k [batch, seq, kv_heads, width], v [batch, seq, kv_heads, v_width] ->
    [batch, seq, heads, v_width]. Of 16-bit tensors on CUDA flash-attn takes care where a working one is installed; else
    torch does, with its own kernel for documents where it has one. Values that are narrower than queries are padded for
    kernels that want one width, and not for others.
    """
    major = _flash_capability(q)
    flash = None if major is None else _flash_attention(major, q.shape[-1], v.shape[-1])
    if flash is not None:
        return _flash(flash, q, k, v, scale, documents)
    if documents is None:
        return _sdpa(q, k, v, scale, _backend_of_two_widths(q, k, v))
    if major is not None and q.shape[-1] % 8 == 0 and _torch_varlen() is not None:
        return _varlen(q, k, v, scale, documents)
    return _sdpa_by_document(q, k, v, scale, documents)


def _flash_capability(q: Tensor) -> int | None:
    """The major compute capability of q's device; None where no flash kernel takes such tensors."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > _MAX_FLASH_WIDTH:
        return None
    major, _ = torch.cuda.get_device_capability(q.device)
    return major if major >= 8 else None


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every head of q, [..., heads, width]."""
    heads, repeats = q.shape[-2], q.shape[-2] // k.shape[-2]
    if repeats == 1:
        return k, v
    return k.repeat_interleave(repeats, -2, output_size=heads), v.repeat_interleave(repeats, -2, output_size=heads)


def _padded(q: Tensor, v: Tensor) -> Tensor:
    """The values in the width of the queries, for kernels that want one width; what is added comes out as zeros."""
    missing = q.shape[-1] - v.shape[-1]
    return functional.pad(v, (0, missing)) if missing > 0 else v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: SDPBackend | None = None) -> Tensor:
    """With the back end that takes values of another width than that of queries; None: padded, and torch's choice."""
    width = v.shape[-1]
    k, v = _repeat_heads(q, k, v if backend is not None else _padded(q, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2)[..., :width]


def _backend_of_two_widths(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend | None:
    """The back end for values that are narrower than queries; None where they are better padded, or not narrower.

    cuDNN's is the fastest where it takes them; flash wants one width, and is faster with padding than the efficient one
    without. Asked once for each kind of call, as it goes through everything that a back end may refuse.
    """
    if not q.is_cuda or v.shape[-1] >= q.shape[-1]:
        return None
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    key = q.device, q.dtype, q.shape, k.shape, v.shape, with_gradient
    if key not in _BACKENDS:
        k, v = _repeat_heads(q, k, v)
        _BACKENDS[key] = _chosen_backend(*(x.transpose(1, 2) for x in (q, k, v)))
    return _BACKENDS[key]


_BACKENDS: dict[tuple[Any, ...], SDPBackend | None] = {}


def _chosen_backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend | None:
    native = SDPAParams(q, k, v, None, 0.0, True, False)
    if can_use_cudnn_attention(native):
        return SDPBackend.CUDNN_ATTENTION
    flash = can_use_flash_attention(SDPAParams(q, k, _padded(q, v), None, 0.0, True, False))
    return SDPBackend.EFFICIENT_ATTENTION if not flash and can_use_efficient_attention(native) else None


def _sdpa_by_document(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: DocumentBounds) -> Tensor:
    batch, seq = q.shape[:2]
    sizes = [count * length for count, length in documents.runs]
    parts = [permute_rows(x.flatten(0, 1), documents.order, documents.inverse).split(sizes) for x in (q, k, v)]
    outputs = []
    for run, *group in zip(documents.runs, *parts, strict=True):
        run_q, run_k, run_v = (x.unflatten(0, run) for x in group)
        outputs.append(_sdpa(run_q, run_k, run_v, scale).flatten(0, 1))
    return permute_rows(torch.cat(outputs), documents.inverse, documents.order).unflatten(0, (batch, seq))


@cache
def _torch_varlen() -> Any:
    """torch's attention of sequences of different lengths; None where this torch has none that can be causal."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    names = _parameters(function)
    return function if "is_causal" in names or {"scale", "window_size"} <= names else None


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: DocumentBounds) -> Tensor:
    """By torch's function in the form that it has: newer ones take a scale and a window, and fewer heads of keys."""
    function, width, v = _torch_varlen(), v.shape[-1], _padded(q, v)
    names, options = _parameters(function), dict[str, Any]()
    if "window_size" in names:
        options = {"scale": scale, "window_size": (-1, 0)}
    else:
        options["is_causal"] = True
        factor = scale * q.shape[-1] ** 0.5  # over the scale that it uses
        q = q if abs(factor - 1.0) < 1e-6 else q * factor
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    else:
        k, v = _repeat_heads(q, k, v)
    bounds, longest = documents.cu_seqlens, documents.longest
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out: Tensor = function(*flat, bounds, bounds, longest, longest, **options)
    return out.unflatten(0, q.shape[:2])[..., :width]


@cache
def _flash_attention(major: int, width: int, v_width: int) -> Any:
    """The installed flash-attn that runs on devices of this major compute capability and takes these widths of queries
    and values, as a module; None without."""
    for name in _FLASH_PACKAGES.get(major, ("flash_attn",)):
        if name == _VERSION_4 and (width, v_width) != _NATIVE_WIDTHS[name] and (width > _MAX_EQUAL_4 or width % 8):
            continue
        module = _working(name)
        if module is not None:
            return module
    return None


@cache
def _working(name: str) -> Any:
    """The package, if it is there and has the functions; one that is there and of no use is named in the log, once."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):  # no version 2 around version 4
            return None
        problem = f"{type(error).__name__}: {error}"
    except Exception as error:  # compiled for another torch or CUDA: what it raises then is anything
        problem = f"{type(error).__name__}: {error}"
    else:
        # flash-attn-4 by itself leaves a folder `flash_attn` without an __init__.py: an empty module.
        missing = [function for function in _FLASH_FUNCTIONS if not callable(getattr(module, function, None))]
        if not missing:
            return module
        problem = f"it has no {' and no '.join(missing)}"
    _log.warning("the installed package %s is not used (%s): attention runs without it.", name, problem)
    return None


def _flash(flash: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: DocumentBounds | None) -> Tensor:
    width = v.shape[-1]
    if (q.shape[-1], width) != _NATIVE_WIDTHS.get(flash.__name__):
        v = _padded(q, v)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if documents is None:
        return _output(flash.flash_attn_func(q, k, v, **options))[..., :width]
    bounds, longest = documents.cu_seqlens, documents.longest
    options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out = _output(flash.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **options))
    return out.unflatten(0, q.shape[:2])[..., :width]


def _output(result: Any) -> Tensor:
    """The output alone: version 4 and early builds of version 3 return the softmax's normaliser beside it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
