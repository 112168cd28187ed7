"""Causal attention inside documents. Bounds are segment lengths, never a dense [seq, seq] mask."""

import importlib.util
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.permute import permute_rows
from mythos_ds.kernels.segments import DocumentBounds


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
    [batch, seq, heads, v_width]. flash-attn is used where it is installed and the tensors are 16-bit on CUDA.
    """
    width, v_width = q.shape[-1], v.shape[-1]
    if v_width < width:  # fused kernels want one width
        v = functional.pad(v, (0, width - v_width))
    flash = _flash_attention()
    if flash is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        out = _flash(flash, q, k, v, scale, documents)
    elif documents is None:
        out = _sdpa(q, k, v, scale)
    else:
        out = _sdpa_by_document(q, k, v, scale, documents)
    return out[..., :v_width]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
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
def _flash_attention() -> Any:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    import flash_attn

    return flash_attn


def _flash(flash: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: DocumentBounds | None) -> Tensor:
    if documents is None:
        return flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    bounds, longest = documents.cu_seqlens(), max(length for _, length in documents.runs)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash.flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)
    return out.unflatten(0, q.shape[:2])
