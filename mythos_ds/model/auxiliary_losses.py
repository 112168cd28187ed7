"""Auxiliary losses and the autograd function by which they enter."""

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (one,) = ctx.saved_tensors
        return grad, one


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns x, and adds the gradient of the scalar `loss` in backward, whatever loss x itself flows into."""
    return _AttachLoss.apply(x, loss)


def balance_loss(scores: Tensor, indices: Tensor, alive: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Computes the sequence-wise balance loss sum_i f_i P_i, mean over sequences (DeepSeek-V3 report, eq. 17-20).

    scores fp32 [batch, seq, n_experts] positive; indices [batch, seq, k]; alive fp32 [batch, seq] or None;
    weights fp32 [batch] of the sequences, or None. Scalar.
    """
    n_experts, k = scores.shape[-1], indices.shape[-1]
    share = scores / scores.sum(-1, keepdim=True)
    alive = scores.new_ones(scores.shape[:2]) if alive is None else alive
    tokens = alive.sum(1).clamp_min(1.0)[:, None]
    chosen = torch.zeros_like(scores).scatter_(-1, indices, 1.0)
    fraction = (chosen * alive[..., None]).sum(1) * (n_experts / k) / tokens
    probability = (share * alive[..., None]).sum(1) / tokens
    losses = (fraction * probability).sum(-1)
    return losses.mean() if weights is None else (losses * weights).mean()


def z_loss(logits: Tensor, alive: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Computes the router z-loss, the mean over tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022).

    logits fp32 [batch, seq, n_experts], alive fp32 [batch, seq] or None; with weights fp32 [batch] of the sequences
    instead, over all tokens. A scalar.
    """
    square = torch.logsumexp(logits, dim=-1).square()
    if weights is not None:
        return (square * weights[:, None]).mean()
    return square.mean() if alive is None else (square * alive).sum() / alive.sum().clamp_min(1.0)
