"""A cross-entropy of hidden states and the head's weight that never holds all logits.

Rows are taken in chunks and their gradients formed in the forward, while the chunk's logits are at hand; the backward
only scales them. Under ZeRO-3 the head's weight is therefore gathered once. Logits, and the sum of the weight's
gradients over the chunks, are fp32 also where the operands are bf16. In plain torch it is
`cross_entropy(hidden @ weight.t(), targets)`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_ds.kernels.float32_product import add_product, product

CHUNK_LOGITS = {"cpu": 1 << 20}
"""Logits held at once, by type of device. On a CPU as many as its caches hold; a GPU would spend more time on adding up
the weight's gradient, once a chunk, than on the products of small chunks."""
_OTHER_CHUNK_LOGITS = 1 << 28
_MIN_CHUNK_ROWS = 256


def chunk_rows(vocab: int, device_type: str) -> int:
    """Rows of hidden states of which a device of this type forms the logits, fp32 [rows, vocab], at once."""
    return max(_MIN_CHUNK_ROWS, CHUNK_LOGITS.get(device_type, _OTHER_CHUNK_LOGITS) // vocab)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool, divisor: float | None
    ) -> Tensor:
        rows = chunk_rows(weight.shape[0], hidden.device.type)
        divisor = hidden.shape[0] if divisor is None else divisor
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            grad_rows = None if grad_hidden is None else grad_hidden[part]
            total += _add_chunk(hidden[part], weight, targets[part], divisor, grad_rows, grad_weight)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def _add_chunk(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    divisor: float,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Returns the sum of a chunk's losses, writes its rows' gradients and adds up the weight's. A function, so that a
    chunk's logits are gone before the next one's come."""
    logits = product(x, weight)
    peak = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, target[:, None])
    exponential = logits.sub_(peak).exp_()
    norm = exponential.sum(-1, keepdim=True)
    total = (norm.log() + peak - chosen).sum()
    if grad_rows is None or grad_weight is None:
        return total
    delta = exponential.mul_(1.0 / (norm * divisor))
    delta.scatter_add_(-1, target[:, None], torch.full_like(chosen, -1.0 / divisor))
    delta = delta.to(x.dtype)
    grad_rows.copy_(delta @ weight)
    add_product(grad_weight, delta, x)
    return total


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float | None = None) -> Tensor:
    """Computes the mean of -log softmax(hidden weight^T)[target], an fp32 scalar; with `divisor` their sum over it.

    hidden [tokens, dim], weight [vocab, dim], targets int64 [tokens]; with a divisor also of no tokens.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled(), divisor)
