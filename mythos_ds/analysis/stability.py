"""Where the state of a looped model goes: how one loop stretches it, and whether tokens settle, cycle or drift.

The numerical part takes plain functions of the state and knows no model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.analysis.plots import Results, labelled, loop_axis, new_panels, save
from mythos_ds.errors import LabError
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.mythos import MythosModel

SETTLED = 1e-3
"""A token whose last relative residual ||h_t - h_{t-1}|| / ||h_t|| is below has settled."""
RETURNED = 0.1
"""One that has not, but whose ||h_t - h_{t-p}|| is below this share of ||h_t - h_{t-1}|| for some period p, cycles. The
rest drifts, which includes what still converges slowly (see `contraction`)."""
PERIODS = range(2, 9)
KINDS = ("settle", "cycle", "drift")

_QUANTILES = (0.1, 0.5, 0.9)
_STEP = 3e-3
_TINY = 1e-30


def directional(step: Callable[[Tensor], Tensor], h: Tensor, direction: Tensor) -> Tensor:
    """J v of a smooth map at h, for a direction v of h's shape: a central difference, right to about 1e-4 in fp32."""
    size = max(float(h.norm()), float(step(h).norm())) or 1.0
    scale = _STEP * size / direction.norm().clamp_min(_TINY)
    return (step(h + scale * direction) - step(h - scale * direction)) / (2 * scale)


def spectral_norm(
    step: Callable[[Tensor], Tensor], h: Tensor, *, iterations: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Largest singular value of the Jacobian of `step` at h, and how much the last iteration changed it, relatively.

    Power iteration on J^T J (J^T u by autograd, J v by `directional`), as the best in the span of all its vectors
    (Lanczos), which converges in far fewer steps. Comes from below.
    """
    point = h.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = step(point)
    v, norm, change = _noise(h, seed), 0.0, 0.0
    basis, images = h.new_zeros(0, h.numel()), h.new_zeros(0, h.numel())
    for _ in range(iterations):
        basis = torch.cat([basis, (v / v.norm()).view(1, -1)])
        with torch.no_grad():
            images = torch.cat([images, directional(step, h, basis[-1].view_as(h)).reshape(1, -1)])
        before, norm = norm, float(torch.linalg.matrix_norm(images @ images.t(), 2)) ** 0.5
        change = abs(norm - before) / max(norm, _TINY)
        (v,) = torch.autograd.grad(output, point, images[-1].view_as(h), retain_graph=True)
        whole, v = v.norm(), v.flatten()
        for _ in range(2):  # once leaves rounding errors in the old directions
            v = v - basis.t() @ (basis @ v)
        if v.norm() <= 1e-4 * whole:
            break  # nothing new is reached
        v = v.view_as(h)
    return norm, change


@dataclass
class Trajectory:
    """What `follow` saw; fp32 on the CPU."""

    mean_square: Tensor
    """[loops, tokens]: of the state after each loop."""
    residual: Tensor
    """[loops, tokens]: ||h_t - h_{t-1}|| / ||h_t||."""
    cosine: Tensor
    """[loops, tokens]: of h_t and h_{t-1}."""
    returned: Tensor
    """[periods, tokens]: ||h_t - h_{t-p}|| / ||h_t|| at the end."""
    orbits: Tensor
    """[loops, watched, dim]: states of a few tokens, evenly spread."""


@torch.no_grad()
def follow(step: Callable[[Tensor, int], Tensor], h: Tensor, loops: int, watched: int = 6) -> Trajectory:
    """Runs h' = step(h, loop) `loops` times from the state h [..., dim]; tokens are its rows."""
    recent = [h.flatten(0, -2).float()]
    shown = torch.linspace(0, len(recent[0]) - 1, min(watched, len(recent[0]))).long().to(h.device)
    seen: list[tuple[Tensor, ...]] = []
    for loop in range(loops):
        h = step(h, loop)
        old, new = recent[-1], h.flatten(0, -2).float()
        cosine = torch.nn.functional.cosine_similarity(old, new, dim=-1)
        seen.append((new.square().mean(-1), _distance(new, old), cosine, new[shown]))
        recent = [*recent[-max(PERIODS) :], new]
    mean_square, residual, cosine, orbits = (torch.stack(values).cpu() for values in zip(*seen, strict=True))
    returned = torch.stack([_distance(recent[-1], recent[-1 - p]) for p in PERIODS if p < len(recent)]).cpu()
    return Trajectory(mean_square, residual, cosine, returned, orbits)


def classify(residual: Tensor, returned: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [tokens]: index into KINDS, and the best period of each, from the last residuals [tokens] and the return
    distances [periods, tokens]."""
    nearest, which = returned.min(0)
    cycles = nearest < RETURNED * residual
    return torch.where(residual < SETTLED, 0, torch.where(cycles, 1, 2)), which + PERIODS[0]


def plane(points: Tensor) -> tuple[Tensor, float]:
    """Coordinates [n, 2] of points [n, dim] in their two principal directions, and the share of variance there."""
    centred = points - points.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = torch.nn.functional.pad((u * s)[:, :2], (0, max(0, 2 - len(s))))
    return coordinates, float(s[:2].square().sum() / s.square().sum().clamp_min(_TINY))


def loop_input(model: MythosModel, batch: dict[str, Tensor]) -> tuple[Tensor, ForwardContext]:
    """`encode` of {tokens, positions} int64 [batch, seq], on the model's device."""
    device = next(model.parameters()).device
    return model.encode(batch["tokens"].to(device), positions=batch["positions"].to(device))


@contextmanager
def smooth(model: MythosModel) -> Iterator[None]:
    """The loop as a smooth map: experts stay those of the first pass inside, and the state is carried in fp32."""
    block, routers = model.recurrent, [layer.router for layer in model.moe_layers()]
    dtype, block.state_dtype = block.state_dtype, torch.float32
    for router in routers:
        router.choose = _once(router.choose)  # type: ignore[method-assign]
    try:
        yield
    finally:
        block.state_dtype = dtype
        for router in routers:
            del router.choose


def measure(
    model: MythosModel, batches: Sequence[dict[str, Tensor]], *, loops: int | None = None, iterations: int = 20
) -> dict[str, Any]:
    """The state over `loops` loops (None: 8 times the trained depth T), as JSON values by name.

    batches: {tokens, positions} int64 [rows, seq]. Jacobians are of the first row alone, of the loops 1, T, 2T and 8T;
    the growth is that of a random perturbation carried along the linearised loops of the same row, whose mean over the
    second half estimates the spectral radius once the state has settled. `contraction`: mean factor per loop of the
    median residual from loop T to 2T. Halting does not act here. Raises LabError for fewer than 2T.
    """
    trained = model.config.mean_recurrence
    loops = 8 * trained if loops is None else loops
    if loops < 2 * trained:
        raise LabError(f"loops: given {loops}; allowed: at least twice the trained depth; nearest: {2 * trained}")
    seen = []
    with torch.no_grad():
        for batch in batches:
            e, context = loop_input(model, batch)
            seen.append(follow(_loop_map(model, e, context), model.start_loop(e, context=context)[0], loops))
        decay = model.recurrent.injection.decay().float().cpu()
    joined = [torch.cat([getattr(own, field.name) for own in seen], 1) for field in fields(Trajectory)[:4]]
    mean_square, residual, cosine, returned = joined
    kind, period = classify(residual[-1], returned)
    shares = [float((kind == index).float().mean()) for index in range(len(KINDS))]
    quantiles = residual.quantile(torch.tensor(_QUANTILES), dim=1).tolist()
    median = quantiles[1]
    contraction = (median[2 * trained - 1] / max(median[trained - 1], _TINY)) ** (1 / trained)
    return {
        "trained": trained,
        "loops": list(range(1, loops + 1)),
        "tokens": residual.shape[1],
        "spectral_radius_A": float(decay.max()),
        "decay": [float(decay.min()), float(decay.median()), float(decay.max())],
        "state_rms": mean_square.mean(1).sqrt().tolist(),
        "residual": {str(q): values for q, values in zip(_QUANTILES, quantiles, strict=True)},
        "cosine": cosine.mean(1).tolist(),
        "contraction": contraction,
        "trajectory": "settle" if median[-1] < SETTLED else KINDS[1 if shares[1] > shares[2] else 2],
        "shares": dict(zip(KINDS, shares, strict=True)),
        "periods": {str(p): float(((kind == 1) & (period == p)).float().mean()) for p in PERIODS},
        "thresholds": {"settled": SETTLED, "returned": RETURNED, "longest_period": max(PERIODS)},
        **_local(model, {name: value[:1] for name, value in batches[0].items()}, loops, trained, iterations),
        "orbits": [
            {"points": points.tolist(), "explained": share} for points, share in map(plane, seen[0].orbits.unbind(1))
        ],
    }


@torch.no_grad()
def _local(model: MythosModel, batch: dict[str, Tensor], loops: int, trained: int, iterations: int) -> dict[str, Any]:
    wanted = sorted({loop for loop in (1, trained, 2 * trained, 8 * trained) if loop <= loops})
    e, context = loop_input(model, batch)
    step, h = _loop_map(model, e, context), model.start_loop(e, context=context)[0].float()
    direction, norms, rates = _noise(h, 1), [], []
    for loop in range(loops):
        with smooth(model):

            def one(x: Tensor, loop: int = loop) -> Tensor:
                return step(x, loop)

            new = one(h)  # first: it fixes the experts
            if loop + 1 in wanted:
                norms.append(spectral_norm(one, h, iterations=iterations))
            moved = directional(one, h, direction)
        rates.append(float(moved.norm() / direction.norm().clamp_min(_TINY)))
        h, direction = new, moved / moved.norm().clamp_min(_TINY)
    late = rates[loops // 2 :]
    return {
        "jacobian": {"loops": wanted, "norm": [norm for norm, _ in norms], "change": [change for _, change in norms]},
        "growth": {"by_loop": rates, "rate": math.exp(sum(math.log(max(rate, _TINY)) for rate in late) / len(late))},
    }


def draw(results: Results, path: Path) -> None:
    """`measure`'s result, or several by label, as a PNG; orbits are those of the first."""
    runs = labelled(results)
    figure, axes = new_panels(2, 3)
    (residuals, rms, cosine), (stretch, kinds, orbits) = axes
    for index, (label, own) in enumerate(runs.items()):
        color, loops, quantiles = f"C{index}", own["loops"], list(own["residual"].values())
        residuals.plot(loops, quantiles[1], color=color, label=label or "median, 10-90 %")
        residuals.fill_between(loops, quantiles[0], quantiles[2], color=color, alpha=0.2, lw=0)
        rms.plot(loops, own["state_rms"], color=color)
        cosine.plot(loops, [max(1 - value, 1e-8) for value in own["cosine"]], color=color)
        stretch.plot(loops, own["growth"]["by_loop"], color=color, label=f"{label} growth".strip())
        stretch.plot(*list(own["jacobian"].values())[:2], "o", color=color, label=f"{label} ||J||".strip())
        bottom = 0.0
        for kind, shade in zip(KINDS, ("C2", "C1", "C3"), strict=True):
            kinds.bar(index, own["shares"][kind], bottom=bottom, color=shade, label=kind if index == 0 else None)
            bottom += own["shares"][kind]
    residuals.axhline(SETTLED, color="grey", lw=0.8, ls="--")
    residuals.set(yscale="log", ylabel="relative residual of a token")
    rms.set(ylabel="rms of the state")
    cosine.set(yscale="log", ylabel="1 - mean cosine(h_t, h_{t-1})")
    stretch.set(yscale="log", ylabel="stretch by one loop")
    stretch.axhline(1.0, color="grey", lw=0.8)
    for panel in (residuals, rms, cosine, stretch):
        loop_axis(panel, runs)
    kinds.set(ylabel="share of tokens at the end", ylim=(0, 1), xlim=(-1, len(runs)))
    kinds.set_xticks(range(len(runs)), list(runs), rotation=20)
    label, first = next(iter(runs.items()))
    for index, orbit in enumerate(first["orbits"]):
        x, y = zip(*orbit["points"], strict=True)
        orbits.plot(x, y, ".-", color=f"C{index}", lw=0.7, ms=3)
        orbits.plot(x[-1:], y[-1:], "s", color=f"C{index}", ms=5)
    title = f"{label} orbits of tokens, to the square".strip()
    orbits.set(xlabel="principal direction 1", ylabel="principal direction 2", title=title)
    for panel in (residuals, stretch, kinds):
        panel.legend(fontsize=7)
    save(figure, path)


def _loop_map(model: MythosModel, e: Tensor, context: ForwardContext) -> Callable[[Tensor, int], Tensor]:
    return lambda h, loop: model.step_loop(h, e, loop=loop, context=context)[0]


def _once(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept: list[Tensor] = []

    def again(scores: Tensor, loop: LoopIndex | None) -> Tensor:
        if not kept:
            kept.append(choose(scores, loop))
        return kept[0]

    return again


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _distance(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(_TINY)
