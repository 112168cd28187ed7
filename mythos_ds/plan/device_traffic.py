"""Bytes that a GPU reads and writes beside its matrix products and attention: norms, activations, casts, rotations,
sums of gradients. Its memory's rate bounds them, and the planner adds that time to the products'. Also how many
operations there are, products too: the host launches each.

Counted by running one looped layer, one dense layer and the head on the meta device, each operation reading its inputs
and writing its results (nothing fused), at two numbers of tokens: what does not grow with them belongs to weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mythos_ds.config.layout import ModelChunk
from mythos_ds.plan.activation_trace import Workload, one_device, piece

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        self.launches += schema.name not in _NOTHING_MOVES and not _is_view(schema)
        if schema.name == "aten::addmm":
            self.bytes += _size(args[0]) + _size(result)
        elif schema.name not in _PRODUCTS | _NOTHING_MOVES and not _is_view(schema):
            self.bytes += sum(_size(value) for value in tree_iter((args, kwargs, result)) if isinstance(value, Tensor))
        return result


def _is_view(schema: Any) -> bool:
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _size(tensor: Tensor) -> int:
    """Bytes in memory: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def micro_batch(load: Workload, loops: float, graded: float) -> Moved:
    """A micro-batch of `loops` loops, the last `graded` of them with gradient, on a GPU that holds all layers and
    n_experts / ep_size of the experts; `load` says the rest, its tokens apart."""
    load = replace(load, rows=1, seq_len=_SAMPLE_TOKENS, fused=True)
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
    return forward * (loops - graded) + trained * graded + sums + dense + _head(load)


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
def _head(load: Workload) -> Moved:
    """The head and the loss, with their backward."""
    part = ModelChunk((), (), (), embeds=False, loops=False, predicts=True)

    def run(model: Any, context: Any, x: Tensor) -> None:
        targets = torch.empty(x.shape[:2], dtype=torch.int64, device="meta")
        model.logits_or_loss(x, targets).backward()

    return _line(load, part, run)


@cache
def _looped_weights(load: Workload) -> tuple[int, int]:
    """The block's weights: how many tensors, and how many numbers."""
    part = ModelChunk((), tuple(range(load.model.recurrent_layers)), (), embeds=False, loops=True, predicts=False)
    sizes = [parameter.numel() for parameter in piece(load, part, load.dtype)[0].parameters()]
    return len(sizes), sum(sizes)


def _line(load: Workload, part: ModelChunk, run: Callable[[Any, Any, Tensor], None]) -> Moved:
    """What `run` moves, along the line through two numbers of tokens."""
    found = []
    for tokens in (load.seq_len, 2 * load.seq_len):
        model, context, x = piece(replace(load, seq_len=tokens), part, load.dtype)
        with one_device(model), MovedBytes() as moved:
            run(model, context, x)
        found.append(moved)
    token = (found[1].bytes - found[0].bytes) / load.seq_len
    return Moved(token, found[0].bytes - token * load.seq_len, found[0].launches)
