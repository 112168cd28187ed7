"""What a training step holds beside weights and optimizer state, from the model's own code on the meta device.

The forward and backward of a micro-batch run without data, at full size; every tensor is counted as it comes and goes.
Tokens are taken to be spread evenly over the experts. Weights count while ZeRO-3 has them gathered: each prelude and
coda layer, the embedding and the head by themselves, the looped block as one, in forward and again in backward; a
gradient counts until its module's backward is over, when ZeRO-3 has averaged and cut it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.schema import ActivationCheckpointing, ModelConfig
from mythos_ds.kernels import attention, cross_entropy, grouped_mlp
from mythos_ds.kernels.grouped_mlp import grouped_swiglu
from mythos_ds.kernels.looped_mlp import looped_swiglu
from mythos_ds.model.context import AuxLoss, ForwardContext
from mythos_ds.model.dispatch import Dispatcher
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Embedding, Initializer
from mythos_ds.model.layers import DenseLayer
from mythos_ds.model.lm_head import LMHead
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.recurrent import RecurrentBlock
from mythos_ds.parallel.overlap import LANES, overlap
from mythos_ds.plan.even_dispatch import even_dispatcher
from mythos_ds.plan.live_bytes import LiveBytes

_MANY_TOKENS = 1 << 20
_SAMPLE_TOKENS = 1 << 17
_MANY_EXPERTS = 128
_AUX = AuxLoss(balance=1e-4, z=1e-5, ponder=0.0, scale=1.0)


@dataclass(frozen=True)
class Workload:
    """What a process computes at once: `rows` sequences of `seq_len` tokens, the last `grad_loops` loops with gradient;
    it holds n_experts / ep_size experts of each layer."""

    model: ModelConfig
    rows: int
    seq_len: int
    grad_loops: int
    ep_size: int
    dtype: torch.dtype
    checkpointing: ActivationCheckpointing
    grad_dtype: torch.dtype = torch.float32
    """What the gradients of a weight add up in."""
    dispatch: str = "all_to_all"
    """What carries rows to experts; with ep_size 1 nothing does."""
    rows_in_fp8: bool = False
    """Whether they go there in eight bits."""
    ranks_per_node: int = 1
    """Of an expert group that spans nodes, with dispatch "per_node"."""
    on_gpu: bool = True
    """Whether kernels take the ways of a GPU: experts as one grouped product, the loss in large chunks."""
    compiled: bool = False
    """Whether regions of elementwise work are compiled."""
    overlap: bool = False
    """Whether the loops run in two lanes."""
    pads_groups: bool = False
    """Whether the GPU's grouped products take whole 16 bytes of rows only."""


@dataclass(frozen=True)
class Trace:
    """Bytes on one process.

    Attributes:
        peak: the most there were at once, gathered weights and their gradients included.
        without_weights: the same with neither.
    """

    peak: int
    without_weights: int


class FusedAttention(torch.autograd.Function):
    """Stands for a fused attention: keeps its inputs, its result and a number per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _EvenExperts(Experts):
    """As many rows for each expert."""

    def __init__(self, local: int, config: ModelConfig, init: Initializer, load: Workload):
        super().__init__(local, config.dim, config.expert_dim, init, config.resolved_init_std)
        self.on_gpu, self.pads_groups = load.on_gpu, load.pads_groups

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        n = self.w1.shape[0]
        w1: Tensor = self.w1
        w2: Tensor = self.w2
        w3: Tensor = self.w3
        if self.on_gpu and rows.dtype == torch.bfloat16:
            counts = torch.empty(n, dtype=torch.int64, device=rows.device)
            with patch.object(grouped_mlp, "takes_any_groups", lambda rows: not self.pads_groups):
                return grouped_swiglu(rows, counts, w1, w2, w3, sums=self._sums)
        if n > _MANY_EXPERTS:  # what is kept of all rows does not depend on how many share them
            n = _MANY_EXPERTS
            w1, w2, w3 = w1[:n], w2[:n], w3[:n]
        sizes = [rows.shape[0] // n + (i < rows.shape[0] % n) for i in range(n)]
        return looped_swiglu(rows, sizes, w1, w2, w3, sums=self._sums if n == len(self.w1) else None)


def _line(measure: Callable[..., int]) -> Callable[..., int]:
    """What `measure` says of a workload; of very many tokens along the line through two of fewer, as every kernel goes
    through them in pieces."""

    @cache
    @wraps(measure)
    def measured(load: Workload, *arguments: Any) -> int:
        samples = _samples(load)
        if samples is None:
            return measure(load, *arguments)
        few, more = (measure(sample, *arguments) for sample in samples)
        return _extended(few, more, load)

    return measured


def _samples(load: Workload) -> tuple[Workload, Workload] | None:
    """Two workloads of fewer tokens, the second of twice the first's; None where the workload itself has few."""
    if load.rows * load.seq_len <= _MANY_TOKENS:
        return None
    return sample(load, _SAMPLE_TOKENS), sample(load, 2 * _SAMPLE_TOKENS)


def sample(load: Workload, tokens: int) -> Workload:
    """The workload with `tokens` tokens: one sequence, or one for each lane."""
    rows = LANES if load.overlap else 1
    return replace(load, rows=rows, seq_len=tokens // rows)


def _extended(few: int, more: int, load: Workload) -> int:
    return few + (more - few) * (load.rows * load.seq_len - _SAMPLE_TOKENS) // _SAMPLE_TOKENS


@cache
def trace(load: Workload) -> Trace:
    """Forward and backward of a micro-batch. Long loops are not run: from the third on, each adds what the one before
    did; nor are very many tokens: memory grows with them evenly."""
    if (samples := _samples(load)) is not None:
        few, more = map(trace, samples)
        return Trace(_extended(few.peak, more.peak, load), _extended(few.without_weights, more.without_weights, load))
    if load.grad_loops <= 3:
        return _run(load, load.grad_loops)
    two, three = _run(load, 2), _run(load, 3)
    loops = load.grad_loops - 3
    return Trace(
        three.peak + loops * (three.peak - two.peak),
        three.without_weights + loops * (three.without_weights - two.without_weights),
    )


@_line
def dense_layer_bytes(load: Workload) -> int:
    """What one prelude or coda layer keeps of a micro-batch until its backward."""
    model, context, x = piece(load, ModelChunk((0,), (), (), embeds=False, loops=False, predicts=False), load.dtype)
    live = LiveBytes(existing=False)
    with _substitutes(), live:
        live.ignore(*model.parameters(), x)
        kept = model.run_prelude(x, context)
        return live.now if kept.requires_grad else 0


@_line
def visit_bytes(load: Workload, layers: tuple[int, ...], waiting: int) -> int:
    """The most that the forward and backward of some looped layers, once, hold on a pipeline stage, while `waiting`
    such visits wait for their backward; their messages, kept and sent, not counted."""
    model, context, x = piece(
        load, ModelChunk((), layers, (), embeds=False, loops=False, predicts=False), torch.float32
    )
    live = LiveBytes(existing=False)

    def visit(context: ForwardContext, message: Tensor) -> Tensor:
        return model.recurrent.run_layers(message, 0, context)[0]

    with one_device(model), live:
        live.ignore(*model.parameters(), *model.buffers(), x)
        out = model.recurrent.recomputed("loop", visit, context, x)
        kept = live.now - out.nbytes
        out.backward(torch.empty_like(out))
    more = max(1, waiting) - 1
    # Without recomputation each counts as the one in backward does: so the figure is calibrated (docs/calibration.md).
    return more * (live.peak if load.checkpointing == "none" else kept) + live.peak


@_line
def loops_bytes(load: Workload, layers: tuple[int, ...], waiting: int) -> int:
    """The most that a stage holds which runs all loops of a micro-batch at once, while `waiting` micro-batches wait for
    their backward."""
    part = ModelChunk((), layers, (), embeds=False, loops=True, predicts=False)
    model, context, x = piece(load, part, load.dtype)
    live = LiveBytes(existing=False)
    with one_device(model), live:
        live.ignore(*model.parameters(), *model.buffers(), x)
        out = model.recurrent(model.normed(x), load.grad_loops + 1, context).to(x.dtype)
        kept = live.now
        out.backward(torch.empty_like(out))
    return (waiting - 1) * kept + live.peak


@_line
def coda_bytes(load: Workload, layers: tuple[int, ...]) -> int:
    """The most that the coda's layers, the head and the loss hold of a micro-batch, the head's gradient included."""
    model, context, x = piece(load, ModelChunk((), (), layers, embeds=False, loops=False, predicts=True), load.dtype)
    targets = torch.empty(load.rows, load.seq_len, dtype=torch.int64, device="meta")
    live = LiveBytes(existing=False)
    with one_device(model), loss_chunks(load), live:
        live.ignore(*model.parameters(), *model.buffers(), x)
        model.logits_or_loss(model.run_coda(x, context), targets).backward()
    return live.peak


def piece(load: Workload, part: ModelChunk, dtype: torch.dtype) -> tuple[MythosModel, ForwardContext, Tensor]:
    """Makes a part of the model on the meta device, its context, and an input [rows, seq_len, dim] with gradient."""
    with torch.device("meta"):
        model = MythosModel(load.model, moe_factory=_even(load), part=part, activation_checkpointing=load.checkpointing)
        _prepare(model, load)
        tokens = torch.empty(load.rows, load.seq_len, dtype=torch.int64)
        x = torch.empty(load.rows, load.seq_len, load.model.dim, dtype=dtype, requires_grad=True)
    return model, model.make_context(tokens, None, _AUX, load.grad_loops), x


@contextmanager
def one_device(model: nn.Module) -> Iterator[None]:
    """Lets a part of a model run by itself: attention is replaced by what it allocates, and gradients of weights go."""
    with _substitutes(), _dropping(model):
        yield


@contextmanager
def loss_chunks(load: Workload) -> Iterator[None]:
    """Lets the loss take its chunks on the meta device as it does on the device that the workload is for."""
    own = cross_entropy.CHUNK_LOGITS
    with patch.dict(own, {} if load.on_gpu else {"meta": own["cpu"]}):
        yield


def _even(load: Workload) -> type[MoE]:
    class Local(MoE):
        """The mixture with this process's experts."""

        def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
            return _EvenExperts(config.n_experts // load.ep_size, config, init, load)

        def make_dispatcher(self) -> Dispatcher:
            return even_dispatcher(
                load.dispatch, load.model, load.ep_size, load.ranks_per_node, in_fp8=load.rows_in_fp8
            )

    return Local


@contextmanager
def _substitutes() -> Iterator[None]:
    """The attention kernel is replaced by what it allocates. Modules whose inputs carry no gradient warn: no matter."""
    replaced = patch.object(attention.functional, "scaled_dot_product_attention", _attention)
    with replaced, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Weight gradients go as soon as they are there: they are counted elsewhere."""

    def drop(parameter: nn.Parameter) -> None:
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in model.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(load: Workload, loops: int) -> Trace:
    with torch.device("meta"):
        model = MythosModel(load.model, moe_factory=_even(load), activation_checkpointing=load.checkpointing)
        _prepare(model, load)
        tokens = torch.empty(load.rows, load.seq_len, dtype=torch.int64)
    live = LiveBytes(existing=False)
    with _substitutes(), loss_chunks(load), _gathers(model, live), live:
        live.ignore(*model.parameters(), *model.buffers())
        loss = model(tokens, n_loops=loops + 1, n_grad_loops=loops, targets=tokens, aux=_AUX)
        loss.backward()
    return Trace(live.peak, live.peak_without)


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    return FusedAttention.apply(q, k, v)


def _prepare(model: MythosModel, load: Workload) -> None:
    """Lanes and types as in training: buffers stay fp32, whatever the weights and their gradients are."""
    if load.overlap:
        overlap(model)
    model.to(load.dtype)
    if load.grad_dtype != load.dtype:
        for parameter in model.parameters():
            parameter.grad_dtype = load.grad_dtype
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.float())


@contextmanager
def _gathers(model: MythosModel, live: LiveBytes) -> Iterator[None]:
    """Counts the weights of a unit around its forward and its backward. A gradient is dropped once it is whole, but
    counts until the unit's backward ends."""
    handles = []
    units = [m for m in model.modules() if isinstance(m, (DenseLayer, RecurrentBlock, Embedding, LMHead))]
    held: dict[nn.Module, int] = {}
    for unit in units:
        size = sum(parameter.nbytes for parameter in unit.parameters())
        held[unit] = 0
        handles += [
            unit.register_forward_pre_hook(lambda *_, size=size: live.add(size)),
            unit.register_forward_hook(lambda *_, size=size: live.add(-size)),
            unit.register_full_backward_pre_hook(lambda *_, size=size: live.add(size)),
            unit.register_full_backward_hook(lambda unit, *_, size=size: live.add(-size - _released(held, unit))),
        ]
        for parameter in unit.parameters():
            handles.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, unit=unit: _drop(parameter, unit, held, live)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(parameter: nn.Parameter, unit: nn.Module, held: dict[nn.Module, int], live: LiveBytes) -> None:
    gradient = parameter.grad
    assert gradient is not None
    held[unit] += gradient.nbytes
    live.ignore(gradient)
    live.add(gradient.nbytes)
    parameter.grad = None


def _released(held: dict[nn.Module, int], unit: nn.Module) -> int:
    size, held[unit] = held[unit], 0
    return size
