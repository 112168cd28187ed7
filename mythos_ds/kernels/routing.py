"""Token-choice routing to experts as functions of tensors: scores, choice, weights, losses, and the order of rows."""

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.kernels.permute import inverse_permutation
from mythos_ds.kernels.regions import region


@region
def router_scores(x: Tensor, weight: Tensor, *, score: str) -> tuple[Tensor, Tensor]:
    """Computes logits x W^T and their scores, "sigmoid" or "softmax", both fp32 [tokens, n_experts], in fp32 whatever
    the dtype of x [tokens, dim] and W [n_experts, dim]."""
    logits = functional.linear(x.float(), weight.float())
    return logits, logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


@region
def biased_choice(
    scores: Tensor,
    bias: Tensor,
    loop_bias: Tensor,
    loop_updates: Tensor,
    index: Tensor | int,
    *,
    trusted_updates: int,
    k: int,
    n_groups: int | None,
    n_limited_groups: int | None,
) -> Tensor:
    """Chooses as `best_experts` by scores with their `selection_bias`."""
    bias = selection_bias(bias, loop_bias, loop_updates, index, trusted_updates)
    return _best(scores + bias, k, n_groups, n_limited_groups)


def selection_bias(
    bias: Tensor, loop_bias: Tensor, loop_updates: Tensor, index: Tensor | int, trusted_updates: int
) -> Tensor:
    """Adds to bias [n_experts] the row of loop_bias [loops, n_experts] of a loop's index, a number or numbers [tokens],
    held at the last row with enough loop_updates [loops]: fp32 [n_experts], or [tokens, n_experts]."""
    trusted = ((loop_updates >= trusted_updates).sum() - 1).clamp_min(0)
    row = trusted.clamp(max=index)  # stays on the device: no wait for the host in each loop
    return (bias + loop_bias.index_select(0, row.view(-1))).view(*row.shape, -1)


@region
def best_experts(scores: Tensor, *, k: int, n_groups: int | None, n_limited_groups: int | None) -> Tensor:
    """Chooses the k best of scores [tokens, n_experts], int64 [tokens, k]; inside the best groups where routing is
    limited."""
    return _best(scores, k, n_groups, n_limited_groups)


def _best(scores: Tensor, k: int, n_groups: int | None, n_limited_groups: int | None) -> Tensor:
    if n_groups is not None and n_limited_groups is not None:
        grouped = scores.unflatten(-1, (n_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = best.topk(n_limited_groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
        scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return scores.topk(k, dim=-1).indices


@region
def routing_weights(scores: Tensor, indices: Tensor, *, route_scale: float) -> Tensor:
    """Computes the chosen experts' shares of their scores, times route_scale: fp32 [tokens, k]."""
    weights = scores.gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-20) * route_scale


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


@region
def router_losses(
    scores: Tensor,
    logits: Tensor,
    indices: Tensor,
    alive: Tensor | None,
    weights: Tensor | None,
    *,
    balance: float,
    z: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes balance times the `balance_loss` plus z times the `z_loss`, and both by themselves without gradient;
    alive is [batch, seq, 1]."""
    alive = None if alive is None else alive[..., 0]
    balance_value, z_value = balance_loss(scores, indices, alive, weights), z_loss(logits, alive, weights)
    return balance * balance_value + z * z_value, balance_value.detach(), z_value.detach()


@region
def sort_by_expert(indices: Tensor, *, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orders the rows of tokens by expert: indices int64 [tokens, k] -> the order int64 [tokens * k], stable, its
    inverse, and the rows of each expert int64 [n_experts]."""
    keys = indices.flatten()
    # A radix sort of 2 bytes passes over them twice, one of 8 eight times.
    order = (keys.to(torch.int16) if n_experts <= torch.iinfo(torch.int16).max else keys).argsort(stable=True)
    return order, inverse_permutation(order), count_experts(indices, n_experts)


def count_experts(indices: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """Counts each expert in indices [tokens, k], over tokens whose mask is nonzero: int64 [n_experts]."""
    ones = torch.ones_like(indices) if mask is None else mask.reshape(-1, 1).expand_as(indices).to(indices.dtype)
    return indices.new_zeros(n_experts).scatter_add_(0, indices.flatten(), ones.flatten())
