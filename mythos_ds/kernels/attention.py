"""Causal attention inside documents. Bounds are segment lengths, never a dense [seq, seq] mask."""

import importlib
import importlib.util
import inspect
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.permute import permute_rows
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.log import get_logger

_log = get_logger(__name__)

_MAX_FLASH_WIDTH = 256
_FLASH_PACKAGES = {9: ("flash_attn_interface", "flash_attn")}
"""Packages of flash-attn by compute capability, the better one first: version 3 is Hopper's. Others: version 2."""
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
    torch does, with its own kernel for documents where it has one.
    """
    width, v_width = q.shape[-1], v.shape[-1]
    if v_width < width:  # fused kernels want one width
        v = functional.pad(v, (0, width - v_width))
    major = _flash_capability(q)
    flash = None if major is None else _flash_attention(major)
    if flash is not None:
        out = _flash(flash, q, k, v, scale, documents)
    elif documents is None:
        out = _sdpa(q, k, v, scale)
    elif major is not None and width % 8 == 0 and _torch_varlen() is not None:
        out = _varlen(q, k, v, scale, documents)
    else:
        out = _sdpa_by_document(q, k, v, scale, documents)
    return out[..., :v_width]


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = _repeat_heads(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


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
    """torch's attention of sequences of different lengths; None where this torch has none with a scale and a window."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function if {"scale", "window_size"} <= set(inspect.signature(function).parameters) else None


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: DocumentBounds) -> Tensor:
    k, v = _repeat_heads(q, k, v)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    bounds, longest = documents.cu_seqlens, documents.longest
    out = _torch_varlen()(*flat, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    return out.unflatten(0, q.shape[:2])


@cache
def _flash_attention(major: int) -> Any:
    """The installed flash-attn that runs on devices of this major compute capability, as a module; None without."""
    for name in _FLASH_PACKAGES.get(major, ("flash_attn",)):
        module = _working(name)
        if module is not None:
            return module
    return None


@cache
def _working(name: str) -> Any:
    """The package, if it is there and has the functions; one that is there and of no use is named in the log, once."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        module = importlib.import_module(name)
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
    options = {"softmax_scale": scale, "causal": True}
    if documents is None:
        return _output(flash.flash_attn_func(q, k, v, **options))
    bounds, longest = documents.cu_seqlens, documents.longest
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = _output(flash.flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, **options))
    return out.unflatten(0, q.shape[:2])


def _output(result: Any) -> Tensor:
    """The output alone: early builds of version 3 return the softmax's normaliser beside it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
