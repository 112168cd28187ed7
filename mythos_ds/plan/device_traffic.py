"""Bytes that a GPU reads and writes beside its matrix products and attention: norms, activations, casts, rotations,
sums of gradients. Its memory's rate bounds them, and the planner adds that time to the products'. Also how many
operations there are, products too: the host launches each.

Counted by running one looped layer, one dense layer and the head on the meta device, each operation reading its inputs
and writing its results, at two numbers of tokens: what does not grow with them belongs to weights, or to the chunks of
the loss. A compiled region reads its inputs and writes its results once, and so does its backward.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mythos_ds.config.layout import ModelChunk
from mythos_ds.kernels.cross_entropy import chunk_rows
from mythos_ds.kernels.regions import regions_called_by
from mythos_ds.plan.activation_trace import Workload, loss_chunks, one_device, piece

_PRODUCTS = {"aten::mm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
_NOTHING_MOVES = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class Moved:
    """Bytes of a micro-batch, for each token and once, and its launches, which do not grow with tokens."""

    token: float
    once: float
    launches: float

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.token + other.token, self.once + other.once, self.launches + other.launches)

    def __mul__(self, times: float) -> "Moved":
        return Moved(self.token * times, self.once * times, self.launches * times)


class MovedBytes(TorchDispatchMode):
    """While active, adds up in `bytes` what operations read and write; of a product that is added to a sum, the sum.
    Counts in `launches` those that compute or copy something, products too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if self._inside:
            self.launches += schema.name in _PRODUCTS
            return result
        self.launches += schema.name not in _NOTHING_MOVES and not _is_view(schema)
        if schema.name == "aten::addmm":
            self.bytes += _size(args[0]) + _size(result)
        elif schema.name not in _PRODUCTS | _NOTHING_MOVES and not _is_view(schema):
            self.note(0, tree_iter((args, kwargs, result)))
        return result

    def note(self, launches: int, values: Iterable[Any]) -> None:
        """Add kernels that touch these tensors once each."""
        self.launches += launches
        self.bytes += sum(_size(value) for value in values if isinstance(value, Tensor))

    @contextmanager
    def inside_a_kernel(self) -> Iterator[None]:
        """Count none of the operations meanwhile but products, which a compiler leaves to their library."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def as_one_kernel(self, function: Callable[..., Any], tensors: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """Run a region as its compiled form: a kernel for the results, and in backward one for all gradients of rows
        and one, which sums over them, for each gradient of a vector."""
        return _OneKernel.apply(self, lambda *own: function(*own, **constants), *tensors)


class _OneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moved: MovedBytes, function: Callable[..., Any], *arguments: Any) -> Any:
        with moved.inside_a_kernel():
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
        with moved.inside_a_kernel(), torch.enable_grad():
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


def micro_batch(load: Workload, loops: float, graded: float) -> Moved:
    """A micro-batch of `loops` loops, the last `graded` of them with gradient, on a GPU that holds all layers and
    n_experts / ep_size of the experts; `load` says the rest."""
    head = _head(replace(load, on_gpu=True), load.rows * load.seq_len)
    load = replace(load, rows=1, seq_len=_SAMPLE_TOKENS, on_gpu=True)
    model = load.model
    layers = min(2, model.recurrent_layers)
    first, both = ([_loop(load, n, gradient) for gradient in (False, True)] for n in (1, layers))
    forward, trained = (
        one + (two + one * -1) * (model.recurrent_layers - 1) for one, two in zip(first, both, strict=True)
    )
    # From the second loop on autograd adds each weight's gradient to the sum of those before.
    tensors, elements = _looped_weights(load)
    sums = Moved(0.0, 3 * load.grad_dtype.itemsize * elements, tensors) * max(0.0, graded - 1)
    dense = _dense(load) * (model.prelude_layers + model.coda_layers)
    return forward * (loops - graded) + trained * graded + sums + dense + head


@cache
def _loop(load: Workload, layers: int, gradient: bool) -> Moved:
    """A loop of the first layers: with gradient forward, backward and what is computed again, else forward alone."""
    part = ModelChunk((), tuple(range(layers)), (), embeds=False, loops=True, predicts=False)

    def run(model: Any, context: Any, x: Tensor) -> None:
        with torch.set_grad_enabled(gradient):
            new, _ = model.recurrent.step(x.float(), x, loop=0, context=context)
        if gradient:
            new.backward(torch.empty_like(new))

    return _line(load, part, run)


@cache
def _dense(load: Workload) -> Moved:
    """Forward and backward of a prelude or coda layer."""
    part = ModelChunk((0,), (), (), embeds=False, loops=False, predicts=False)

    def run(model: Any, context: Any, x: Tensor) -> None:
        out = model.run_prelude(x, context)
        out.backward(torch.empty_like(out))

    return _line(load, part, run)


@cache
def _head(load: Workload, tokens: int) -> Moved:
    """The head and the loss of `tokens` tokens, with their backward: what each of its chunks does, and the rest."""
    part = ModelChunk((), (), (), embeds=False, loops=False, predicts=True)

    def run(model: Any, context: Any, x: Tensor) -> None:
        targets = torch.empty(x.shape[:2], dtype=torch.int64, device="meta")
        model.logits_or_loss(x, targets).backward()

    rows = chunk_rows(load.model.vocab_size, "cuda")
    half, one, two = (_moved(replace(load, rows=1, seq_len=n), part, run) for n in (rows // 2, rows, 2 * rows))
    token = (one.bytes - half.bytes) / (rows - rows // 2)
    chunk, chunks = two.bytes - one.bytes - token * rows, ceil(tokens / rows)
    launches = one.launches + (chunks - 1) * (two.launches - one.launches)
    return Moved(token, one.bytes - token * rows + (chunks - 1) * chunk, launches)


@cache
def _looped_weights(load: Workload) -> tuple[int, int]:
    """The block's weights: how many tensors, and how many numbers."""
    part = ModelChunk((), tuple(range(load.model.recurrent_layers)), (), embeds=False, loops=True, predicts=False)
    sizes = [parameter.numel() for parameter in piece(load, part, load.dtype)[0].parameters()]
    return len(sizes), sum(sizes)


def _line(load: Workload, part: ModelChunk, run: Callable[[Any, Any, Tensor], None]) -> Moved:
    """What `run` moves, along the line through two numbers of tokens."""
    few, more = (_moved(replace(load, seq_len=tokens), part, run) for tokens in (load.seq_len, 2 * load.seq_len))
    token = (more.bytes - few.bytes) / load.seq_len
    return Moved(token, few.bytes - token * load.seq_len, few.launches)


def _moved(load: Workload, part: ModelChunk, run: Callable[[Any, Any, Tensor], None]) -> MovedBytes:
    model, context, x = piece(load, part, load.dtype)
    moved = MovedBytes()
    compiled = regions_called_by(moved.as_one_kernel) if load.compiled else nullcontext()
    with one_device(model), loss_chunks(load), compiled, moved:
        run(model, context, x)
    return moved
