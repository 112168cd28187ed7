"""The gradients of stacked weights of experts, added up in place over the calls of one graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class StackedGradient:
    """The gradient of stacked weights in one backward, to which experts add their parts; it becomes whole when it is
    taken. In the weight's own type of gradients."""

    def __init__(self, weight: Tensor):
        own = getattr(weight, "grad_dtype", None) if weight.is_leaf else None  # what is computed has none to ask for
        self._like = weight.shape, own or weight.dtype, weight.device
        self._whole: Tensor | None = None
        self._written: set[int] = set()
        self._backward = -1

    def _forget(self) -> None:
        """A backward that broke off leaves nothing to the next one."""
        current = torch._C._current_graph_task_id()
        if self._whole is None or current != self._backward:
            self._whole, self._written, self._backward = None, set(), current

    def _begin(self) -> Tensor:
        """The memory."""
        self._forget()
        if self._whole is None:
            shape, dtype, device = self._like
            self._whole = torch.empty(shape, dtype=dtype, device=device)
        return self._whole

    def add(self, index: int, delta: Tensor, rows: Tensor) -> None:
        """Adds delta^T rows to the gradient of expert `index`."""
        own = self._begin()[index]
        if index in self._written:
            own += delta.t() @ rows
        elif own.dtype == delta.dtype:
            torch.mm(delta.t(), rows, out=own)
        else:
            own.copy_(delta.t() @ rows)
        self._written.add(index)

    def add_all(self, delta: Tensor) -> None:
        """Adds to the gradients of all experts; delta is given away."""
        self._forget()
        if self._written:
            self._fill()
            self._begin().add_(delta)
        elif delta.dtype == self._like[1]:
            self._whole = delta
        else:
            self._begin().copy_(delta)
        self._written.update(range(len(delta)))

    def take(self) -> Tensor:
        """Gives the gradient away: zeros for experts that added nothing, as every rank has a gradient."""
        whole = self._begin()
        self._fill()
        self._whole = None
        return whole

    def _fill(self) -> None:
        whole = self._begin()
        for index in range(len(whole)):
            if index not in self._written:
                whole[index].zero_()


class _HandOver(torch.autograd.Function):
    """Stands between weights and the calls that use them: its backward comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: StackedGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph: its gradient would lack the experts' part, without a word
            raise RuntimeError("the gradient of experts' weights has no gradient of its own")
        return ctx.gradient.take(), None


@dataclass(frozen=True)
class GradientSums:
    """Adds up the gradients of stacked w1, w2 and w3 over the calls of one graph.

    A graph that runs the same experts in many loops would otherwise make a whole gradient in each, with zeros for every
    expert without rows there, and add them all up; so every loop adds to the experts it used.
    """

    gradients: tuple[StackedGradient, ...]
    tokens: tuple[Tensor, ...]
    """Empty tensors by which a call depends on the weights."""

    @classmethod
    def of(cls, *weights: Tensor) -> "GradientSums":
        """Makes those of w1, w2 and w3, with nothing added yet."""
        gradients = tuple(map(StackedGradient, weights))
        return cls(gradients, tuple(_HandOver.apply(w, g) for w, g in zip(weights, gradients, strict=True)))


def asked(ctx: Any, gradients: Sequence[StackedGradient]) -> list[StackedGradient | None]:
    """Returns those whose weights want a gradient in this backward of a function that was applied to `GradientSums`'s
    tokens last; None for weights that are frozen, or where only the gradient of rows is computed."""
    nodes = [node for node, _ in ctx.next_functions[-len(gradients) :]]
    wanted = [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
    return [gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)]
