"""What the routers of a looped model do from loop to loop: who is used, and whether tokens change experts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.analysis.plots import Results, labelled, loop_axis, new_panels, save
from mythos_ds.analysis.stability import loop_input
from mythos_ds.kernels.routing import count_experts
from mythos_ds.model.forward_stats import jaccard_overlap, load_imbalance
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import Router, Routing

DEAD_SHARE = 0.01
"""An expert with less than this share of its uniform load is dead."""


class _Listener:
    """Keeps what one router answered, by loop, over all batches."""

    def __init__(self, router: Router):
        self.router = router
        self.indices: dict[int, list[Tensor]] = {}
        self.prebias: dict[int, Tensor] = {}
        self.shares: dict[int, Tensor] = {}
        self.entropies: dict[int, float] = {}

    def __call__(self, router: Router, arguments: tuple[Any, ...], routing: Routing) -> None:
        loop, scores = arguments[1].number, routing.scores
        share = scores / scores.sum(-1, keepdim=True)
        counts = count_experts(router.choose(scores, None), scores.shape[-1]).cpu()
        self.indices.setdefault(loop, []).append(routing.indices.cpu())
        self.prebias[loop] = self.prebias.get(loop, 0) + counts
        self.shares[loop] = self.shares.get(loop, 0) + share.sum(0).cpu()
        self.entropies[loop] = self.entropies.get(loop, 0.0) - float(torch.xlogy(share, share).sum())


@torch.no_grad()
def measure(model: MythosModel, batches: Sequence[dict[str, Tensor]], *, n_loops: int | None = None) -> dict[str, Any]:
    """Routing of each recurrent layer in loops 1 .. n_loops (None: the trained depth), as JSON values by name.

    batches: {tokens, positions} int64 [rows, seq]. All positions count, halted ones too.
    """
    trained = model.config.mean_recurrence
    listeners = [_Listener(layer.router) for layer in model.moe_layers()]
    handles = [own.router.register_forward_hook(own) for own in listeners]
    try:
        for batch in batches:
            e, context = loop_input(model, batch)
            model.recurrent(e, n_loops or trained, context)
    finally:
        for handle in handles:
            handle.remove()
    return {"trained": trained, "layers": [_summary(own, model.config.n_experts) for own in listeners]}


def _summary(own: _Listener, n_experts: int) -> dict[str, Any]:
    indices = [torch.cat(parts) for _, parts in sorted(own.indices.items())]
    tokens = len(indices[0])
    counts = torch.stack([count_experts(chosen, n_experts) for chosen in indices]).float()
    prebias = torch.stack([value for _, value in sorted(own.prebias.items())]).float()
    mean = torch.stack([value for _, value in sorted(own.shares.items())]) / tokens
    load, free = (values / values.sum(-1, keepdim=True) for values in (counts, prebias))
    return {
        "experts": n_experts,
        "chosen": indices[0].shape[-1],
        "tokens": tokens,
        "loops": list(range(1, len(indices) + 1)),
        "load": load.tolist(),
        "max_over_mean": load_imbalance(counts).tolist(),
        "dead_experts": (load < DEAD_SHARE / n_experts).sum(-1).tolist(),
        "load_entropy": (-torch.xlogy(load, load).sum(-1)).tolist(),
        "entropy_of_mean": (-torch.xlogy(mean, mean).sum(-1)).tolist(),
        "mean_entropy": [value / tokens for _, value in sorted(own.entropies.items())],
        "largest_entropy": math.log(n_experts),
        "prebias_load": free.tolist(),
        "moved_by_bias": (0.5 * (load - free).abs().sum(-1)).tolist(),
        **overlaps(indices, n_experts),
    }


def overlaps(indices: Sequence[Tensor], n_experts: int) -> dict[str, Any]:
    """Jaccard overlaps of expert sets int64 [tokens, k] by loop.

    `overlap` [loops, loops]: of a token with itself in another loop; `overlap_other_token`: with another, random token
    there; `overlap_random`: of random sets with the loops' loads, as the ratio m / (2k - m) for the expected number
    m = k^2 sum_e load_a load_b of common experts. `same_set`, `disjoint_set`: shares of tokens, first to last loop.
    """
    k, tokens = indices[0].shape[-1], len(indices[0])
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # never the token itself
    loads = torch.stack([count_experts(chosen, n_experts) for chosen in indices]).float() / (tokens * k)
    common = k * k * loads @ loads.t()
    shared = (indices[0][:, :, None] == indices[-1][:, None, :]).any(-1).sum(-1)
    return {
        "overlap": [[float(jaccard_overlap(a, b)) for b in indices] for a in indices],
        "overlap_other_token": [[float(jaccard_overlap(a, b[other])) for b in indices] for a in indices],
        "overlap_random": (common / (2 * k - common)).tolist(),
        "same_set": float((shared == k).float().mean()),
        "disjoint_set": float((shared == 0).float().mean()),
    }


def draw(results: Results, path: Path) -> None:
    """`measure`'s result, or several by label, as a PNG: a row of panels for each model and layer."""
    runs = labelled(results)
    rows = [(label, own, number) for label, own in runs.items() for number in range(len(own["layers"]))]
    figure, axes = new_panels(len(rows), 4)
    for (label, own, number), (overlap, away, balance, load) in zip(rows, axes, strict=True):
        layer = own["layers"][number]
        loops, n = layer["loops"], len(layer["loops"])
        box = (0.5, n + 0.5, n + 0.5, 0.5)
        image = overlap.imshow(layer["overlap"], vmin=0, vmax=1, extent=box)
        figure.colorbar(image, ax=overlap)
        overlap.set(title=f"{label} layer {number}: Jaccard overlap".strip(), xlabel="loop", ylabel="loop")
        for name, style in (("overlap", "-"), ("overlap_other_token", "--"), ("overlap_random", ":")):
            away.plot(loops, layer[name][0], style, label=name.replace("_", " "))
        away.set(ylabel="overlap with loop 1", ylim=(0, 1.05))
        balance.plot(loops, layer["max_over_mean"], label="max / mean load")
        balance.plot(loops, layer["dead_experts"], label="dead experts")
        balance.plot(loops, layer["entropy_of_mean"], label="entropy of the mean (nats)")
        balance.plot(loops, layer["mean_entropy"], "--", label="mean entropy (nats)")
        balance.set(ylabel="balance", ylim=(0, None))
        image = load.imshow(layer["load"], aspect="auto", extent=(-0.5, layer["experts"] - 0.5, n + 0.5, 0.5), vmin=0)
        figure.colorbar(image, ax=load)
        load.set(title="share of load", xlabel="expert", ylabel="loop")
        for panel in (overlap, load):
            panel.locator_params(integer=True)
        for panel in (away, balance):
            loop_axis(panel, {label: own})
            panel.legend(fontsize=7)
    save(figure, path)
