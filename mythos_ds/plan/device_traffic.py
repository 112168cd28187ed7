"""Bytes that a GPU reads and writes beside its matrix products and attention: norms, activations, casts, rotations,
sums of gradients. Its memory's rate bounds them, and the planner adds that time to the products'. Also how many
operations there are, products too: the host launches each.

Counted by running one looped layer, one dense layer and the head on the meta device, each operation reading its inputs
and writing its results, at two numbers of tokens: what does not grow with them belongs to weights, or to the chunks of
the loss. A compiled region reads its inputs and writes its results once, and so does its backward.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from mythos_ds.config.layout import ModelChunk
from mythos_ds.kernels.cross_entropy import chunk_rows
from mythos_ds.kernels.regions import regions_called_by
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.plan.activation_trace import Workload, loss_chunks, one_device, piece, sample
from mythos_ds.plan.loop_order import SAMPLE_TOKENS, recorded, works
from mythos_ds.plan.moved_bytes import MovedBytes


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


def micro_batch(load: Workload, loops: float, graded: float) -> Moved:
    """A micro-batch of `loops` loops, the last `graded` of them with gradient, on a GPU that holds all layers and
    n_experts / ep_size of the experts; `load` says the rest."""
    head = _head(replace(load, on_gpu=True), load.rows * load.seq_len)
    load = sample(replace(load, on_gpu=True), SAMPLE_TOKENS)
    model = load.model
    layers = min(2, model.recurrent_layers)
    first, both = ([_loop(load, n, gradient) for gradient in (False, True)] for n in (1, layers))
    forward, trained = (
        one + (two + one * -1) * (model.recurrent_layers - 1) for one, two in zip(first, both, strict=True)
    )
    sums = _loop_sums(load) * max(0.0, graded - 1)
    dense = _dense(load) * (model.prelude_layers + model.coda_layers)
    return forward * (loops - graded) + trained * graded + sums + dense + head


@cache
def _loop(load: Workload, layers: int, gradient: bool) -> Moved:
    """A loop of the first layers, by `recorded`, along the line through two numbers of tokens."""
    longer = replace(load, seq_len=2 * load.seq_len)
    few, more = (works(recorded(each, layers, gradient=gradient)) for each in (load, longer))
    tokens = load.rows * load.seq_len
    token = (sum(work.bytes for work in more) - (size := sum(work.bytes for work in few))) / tokens
    return Moved(token, size - token * tokens, sum(work.launches for work in few))


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
    load = replace(load, overlap=False)
    half, one, two = (_moved(sample(load, n), part, run) for n in (rows // 2, rows, 2 * rows))
    token = (one.bytes - half.bytes) / (rows - rows // 2)
    chunk, chunks = two.bytes - one.bytes - token * rows, ceil(tokens / rows)
    launches = one.launches + (chunks - 1) * (two.launches - one.launches)
    return Moved(token, one.bytes - token * rows + (chunks - 1) * chunk, launches)


@cache
def _loop_sums(load: Workload) -> Moved:
    """What each loop from the second on adds: autograd adds each weight's gradient to the sum of those before, and
    experts theirs in place, where the first loop copied it or, of the same type, handed it over."""
    part = ModelChunk((), tuple(range(load.model.recurrent_layers)), (), embeds=False, loops=True, predicts=False)
    item, copied, found = load.grad_dtype.itemsize, load.grad_dtype != load.dtype, Moved(0.0, 0.0, 0)
    for name, parameter in piece(load, part, load.dtype)[0].named_parameters():
        in_place = is_expert(name)
        times = 1 if in_place and copied else 3
        found += Moved(0.0, times * item * parameter.numel(), 0 if in_place and copied else 1)
    return found


def _line(load: Workload, part: ModelChunk, run: Callable[[Any, Any, Tensor], None]) -> Moved:
    """What `run` moves, along the line through two numbers of tokens."""
    few, more = (_moved(replace(load, seq_len=length), part, run) for length in (load.seq_len, 2 * load.seq_len))
    tokens = load.rows * load.seq_len
    token = (more.bytes - few.bytes) / tokens
    return Moved(token, few.bytes - token * tokens, few.launches)


def _moved(load: Workload, part: ModelChunk, run: Callable[[Any, Any, Tensor], None]) -> MovedBytes:
    model, context, x = piece(load, part, load.dtype)
    moved = MovedBytes()
    compiled = regions_called_by(moved.as_one_kernel) if load.compiled else nullcontext()
    with one_device(model), loss_chunks(load), compiled, moved:
        run(model, context, x)
    return moved
