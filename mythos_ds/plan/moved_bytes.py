"""Counts what operations read and write, and how many there are, a compiled region as one kernel."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PRODUCTS = {"aten::mm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
_NOTHING_MOVES = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_END_A_KERNEL = {
    f"aten::{name}"
    for name in (
        "cat",
        "clone",
        "sort",
        "topk",
        "scatter_",
        "scatter_add_",
        "index_put_",
        "new_zeros",
        "zeros_like",
        "sum",
    )
}
"""Operations of a region at which a compiler begins another kernel, or which it leaves to a library."""


class MovedBytes(TorchDispatchMode):
    """While active, adds up in `bytes` what operations read and write; of a product that is added to a sum, the sum.
    Counts in `launches` those that compute or copy something, products too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0
        self._inside: frozenset[str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if self._inside is not None:
            self.launches += schema.name in self._inside
            return result
        self.launches += schema.name not in _NOTHING_MOVES and not _is_view(schema)
        if schema.name == "aten::addmm":
            self.bytes += _size(args[0]) + _size(result)
        elif schema.name not in PRODUCTS | _NOTHING_MOVES and not _is_view(schema):
            self.note(0, tree_iter((args, kwargs, result)))
        return result

    def note(self, launches: int, values: Iterable[Any]) -> None:
        """Add kernels that touch these tensors once each."""
        self.launches += launches
        self.bytes += sum(_size(value) for value in values if isinstance(value, Tensor))

    @contextmanager
    def inside_a_kernel(self, *, whole: bool) -> Iterator[None]:
        """Count none of the operations meanwhile but products, which a compiler leaves to their library, and with
        `whole` those that end a kernel."""
        self._inside = frozenset(PRODUCTS | _END_A_KERNEL if whole else PRODUCTS)
        try:
            yield
        finally:
            self._inside = None

    def as_one_kernel(self, function: Callable[..., Any], tensors: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """Run a region as its compiled form: a kernel for the results, and another after each operation that ends one;
        in backward one for all gradients of rows and one, which sums over them, for each gradient of a vector."""
        return _OneKernel.apply(self, lambda *own: function(*own, **constants), *tensors)


class _OneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moved: MovedBytes, function: Callable[..., Any], *arguments: Any) -> Any:
        with moved.inside_a_kernel(whole=True):
            out = function(*arguments)
        moved.note(1, tree_iter((arguments, out)))
        ctx.moved, ctx.function = moved, function
        ctx.others = [None if isinstance(value, Tensor) else value for value in arguments]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in arguments))
        ctx.mark_non_differentiable(*(value for value in tree_iter(out) if not value.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        moved, wanted, kept = ctx.moved, ctx.needs_input_grad[2:], ctx.saved_tensors
        with moved.inside_a_kernel(whole=False), torch.enable_grad():
            arguments = [
                other if saved is None else saved.detach().requires_grad_(needs)
                for saved, other, needs in zip(kept, ctx.others, wanted, strict=True)
            ]
            out = [value for value in tree_iter(ctx.function(*arguments)) if value.requires_grad]
            given = [grad for grad in grads if grad is not None]
            inputs = [value for value, needs in zip(arguments, wanted, strict=True) if needs]
            found = iter(torch.autograd.grad(out, inputs, [torch.empty_like(value) for value in out]))
        results = [next(found) if needs else None for needs in wanted]
        vectors = sum(result is not None and result.dim() == 1 for result in results)
        moved.note(1 + vectors, (*kept, *given, *results))
        return None, None, *results


def _is_view(schema: Any) -> bool:
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _size(tensor: Tensor) -> int:
    """Bytes in memory: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
