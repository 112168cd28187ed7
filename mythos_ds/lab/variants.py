"""Variants of the looped block that studies compare with; none is an option of the model.

Each changes a model right after it was made. Parameters are made from the seed of the model's own first weight, so that
runs repeat.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.model.auxiliary_losses import attach_loss
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.injection import INITIAL_DT
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.recurrent import RecurrentBlock


class Addition(nn.Module):
    """h + e: A = B = 1, marginally stable."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def decay(self) -> Tensor:
        """The diagonal of A."""
        return torch.ones(self.dim)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h.float() + e.float()


class ConcatProjection(nn.Module):
    """W [h; e] with a learned matrix (the adapter of Geiping et al. 2025), whose spectral radius nothing bounds."""

    def __init__(self, dim: int, std: float):
        super().__init__()
        generator = torch.Generator().manual_seed(dim)
        self.weight = nn.Parameter(torch.randn(dim, 2 * dim, generator=generator) * std)

    def decay(self) -> Tensor:
        """The moduli of the eigenvalues of W's part on h."""
        return torch.linalg.eigvals(self.weight.detach()[:, : self.weight.shape[0]].float().cpu()).abs()

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return nn.functional.linear(torch.cat([h.float(), e.float()], -1), self.weight.float())


class NoInput(nn.Module):
    """The state alone, h or A h; h_0 is e."""

    def __init__(self, injection: Any | None, dim: int):
        super().__init__()
        self.injection, self.dim = injection, dim

    def decay(self) -> Tensor:
        """The diagonal of A."""
        return torch.ones(self.dim) if self.injection is None else self.injection.decay()

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h.float() if self.injection is None else (self.injection.decay() * h).float()


class ResidualStreams(nn.Module):
    """n states mixed once per loop by learned scalars (hyper-connections, Zhu et al. 2024, arXiv 2409.19606, but per
    loop as in arXiv 2604.21254): the block reads sum_i read_i s_i; s_i' = sum_j mix_ij s_j + write_i block(...).

    At the start the block sees one stream, and the others are its states of earlier loops.
    """

    def __init__(self, block: RecurrentBlock, n: int):
        super().__init__()
        self.block, self.n = block, n
        first = torch.eye(n)[0]
        self.read, self.write, self.readout = (nn.Parameter(first.clone()) for _ in range(3))
        self.mix = nn.Parameter(torch.diag(torch.ones(n - 1), -1).flatten())

    def moe_layers(self) -> list[MoE]:
        """See RecurrentBlock."""
        return self.block.moe_layers()

    def forward(self, e: Tensor, n_loops: int, context: ForwardContext) -> Tensor:
        """See RecurrentBlock."""
        if context.depths is not None:
            raise ValueError("residual streams do not know a depth per sequence")
        streams = torch.stack([self.block.start(e, context)] * self.n)
        for loop in range(n_loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and loop >= n_loops - context.n_grad_loops):
                read, last = _weighted(self.read, streams), loop == n_loops - 1
                new, _ = self.block.step(read, e, loop=loop, last=last, context=context)
                mixed = torch.einsum("ij,jbsd->ibsd", self.mix.view(self.n, self.n).float(), streams)
                streams = mixed + self.write.float()[:, None, None, None] * new
            if context.records.wants_states:
                context.records.note_state(loop, new)
        return _weighted(self.readout, streams)


class JacobianPenalty(nn.Module):
    """Adds weight * mean ||J v||^2 / ||v||^2 to the loss: J the Jacobian of one loop at the last state, v random (the
    radius penalty of arXiv 2605.26733, by a finite difference). Costs two more loops per step."""

    _STEP = 1e-2

    def __init__(self, block: RecurrentBlock, weight: float):
        super().__init__()
        self.block, self.weight = block, weight

    def moe_layers(self) -> list[MoE]:
        """See RecurrentBlock."""
        return self.block.moe_layers()

    def forward(self, e: Tensor, n_loops: int, context: ForwardContext) -> Tensor:
        """See RecurrentBlock."""
        h = self.block(e, n_loops, context)
        if not torch.is_grad_enabled():
            return h
        quiet = replace(context, records=ForwardRecords.closed(), aux=None)
        state, direction = h.detach(), torch.randn_like(h)
        direction = direction / direction.norm(dim=-1, keepdim=True) * self._STEP * state.norm(dim=-1, keepdim=True)
        both = (state + direction, state)
        moved, still = (self.block.step(x, e, loop=n_loops, last=True, context=quiet)[0] for x in both)
        gain = (moved - still).square().sum(-1) / direction.square().sum(-1).clamp_min(1e-12)
        return attach_loss(h, self.weight * gain.mean())


def _weighted(weights: Tensor, streams: Tensor) -> Tensor:
    return torch.einsum("i,ibsd->bsd", weights.float(), streams)


def _inject(make: Callable[[MythosModel], nn.Module], *, from_e: bool = False) -> Callable[[MythosModel], None]:
    def adapt(model: MythosModel) -> None:
        model.recurrent.injection = make(model)  # type: ignore[assignment]
        model.recurrent.starts_from_e = model.recurrent.starts_from_e or from_e

    return adapt


def _streams(n: int) -> Callable[[MythosModel], None]:
    def adapt(model: MythosModel) -> None:
        model.recurrent = ResidualStreams(model.recurrent, n)  # type: ignore[assignment]

    return adapt


def _penalty(weight: float) -> Callable[[MythosModel], None]:
    def adapt(model: MythosModel) -> None:
        model.recurrent = JacobianPenalty(model.recurrent, weight)  # type: ignore[assignment]

    return adapt


def _balance(shared: float, per_loop: float) -> Callable[[MythosModel], None]:
    def adapt(model: MythosModel) -> None:
        for layer in model.moe_layers():
            layer.router.bias_shares = (shared, per_loop)

    return adapt


def _decay(value: float) -> Callable[[MythosModel], None]:
    def adapt(model: MythosModel) -> None:
        with torch.no_grad():
            model.recurrent.injection.log_A.fill_(math.log(-math.log(value) / INITIAL_DT))

    return adapt


CONTROLS: dict[str, Callable[[MythosModel], None]] = {
    "addition": _inject(lambda model: Addition(model.config.dim)),
    "concat": _inject(lambda model: ConcatProjection(model.config.dim, model.config.resolved_init_std)),
    "no_input": _inject(lambda model: NoInput(None, model.config.dim), from_e=True),
    "decayed_no_input": _inject(lambda model: NoInput(model.recurrent.injection, model.config.dim), from_e=True),
    "jacobian_penalty": _penalty(0.1),
    "streams_2": _streams(2),
    "shared_bias": _balance(1.0, 0.0),
    "loop_bias": _balance(0.0, 1.0),
    "decay_0.05": _decay(0.05),
}
"""By the name that a study's arm gives."""
