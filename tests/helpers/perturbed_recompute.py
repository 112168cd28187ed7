"""Recomputes that do not reproduce their forward: the inputs of every mixture of experts are moved by noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mythos_ds.model.context import ForwardContext
from mythos_ds.model.moe import MoE
from mythos_ds.model.router import Router, Routing
from mythos_ds.model.steps import Steps


class Choices:
    """The experts that each (layer, loop) chose, int64 [tokens, k], and how often it was run."""

    def __init__(self) -> None:
        self.forward: dict[tuple[int, int], Tensor] = {}
        self.recompute: dict[tuple[int, int], Tensor] = {}
        self.loops_kept: list[int] = []
        """The loops whose routing was kept for a recompute, one entry per layer."""

    def changed(self) -> int:
        """Counts the tokens' choices that the recomputes did not make as their forwards had."""
        return sum(int((self.forward[key] != indices).sum()) for key, indices in self.recompute.items())


@contextmanager
def perturbed_recompute(model: nn.Module, noise: float, seed: int) -> Iterator[Choices]:
    """Notes the choices of `model`; in recomputes, which come after a forward has closed its records, adds noise of
    that standard deviation to what routers and experts see."""
    generator = torch.Generator().manual_seed(seed)
    choices, place = Choices(), (0, 0, False)

    steps = MoE.steps

    def entering(module: MoE, x: Tensor, loop: int, context: ForwardContext, *rest: Any) -> Steps[Tensor]:
        nonlocal place
        place = module.layer, loop, not context.records.open
        if place[2]:
            x = x + noise * torch.randn(x.shape, generator=generator)
        elif context.replay is not None:
            choices.loops_kept.append(loop)
        return steps(module, x, loop, context, *rest)

    def chosen(module: Router, inputs: tuple[Any, ...], routing: Routing) -> None:
        layer, loop, recomputed = place
        (choices.recompute if recomputed else choices.forward)[layer, loop] = routing.indices

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, MoE):
            handles.append(module.router.register_forward_hook(chosen))
    try:
        with patch.object(MoE, "steps", entering):
            yield choices
    finally:
        for handle in handles:
            handle.remove()
