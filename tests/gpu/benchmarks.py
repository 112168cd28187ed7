"""Call 3: figures. Times are medians by the device's own clock; what is compared is measured in one run.

Bars are shares of what the data sheet or this run's own copy rate says, for H100 and H200; on other devices, and on the
CPU at small sizes, figures are only reported.
"""

import gc
import math
import statistics
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from mythos_ds.api import load_config
from mythos_ds.bench.acceptance import Probe
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.config.schema import RunConfig
from mythos_ds.costs.flops import flops_per_token
from mythos_ds.engine.build import build_engine
from mythos_ds.engine.training_engine import StepResult, TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.hardware import peak_bf16
from mythos_ds.kernels.attention import causal_attention
from mythos_ds.kernels.cross_entropy import chunked_cross_entropy
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.feed_forward import Experts, FeedForward
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.norm import RMSNorm
from mythos_ds.parallel.groups import init_parallel
from mythos_ds.plan.memory import memory
from tests.distributed.cases import toy_run
from tests.gpu.devices import filled_model, milliseconds
from tests.gpu.kernel_checks import BACKENDS, document_positions

HOPPER = ("H100", "H200", "GH200")
COPY_TB_S = {"H200": 4.0, "H100": 2.8}
"""Bytes read and written in a second by a copy on the device."""
BF16 = torch.bfloat16
_OUTSIDE = ("context", "communicators", "fragmentation")
"""Items of the plan that torch's allocator does not count."""


def hopper(probe: Probe) -> str | None:
    """The name of a GPU that the bars were set for."""
    if not probe.on_gpu:
        return None
    name = torch.cuda.get_device_name(0)
    return name if any(part in name for part in HOPPER) and "PCIe" not in name else None


def rate(probe: Probe, name: str, flops: float, ms: float, share: float | None = None) -> None:
    """Note a rate in TFLOP/s; `share`: of the data sheet's, that it is held to on the GPUs that have bars."""
    device = hopper(probe)
    peak = peak_bf16(device) if device else None
    bar = share * peak / 1e12 if share is not None and peak is not None else None
    probe.number(name, flops / ms / 1e9, "TFLOP/s", at_least=bar)


def ceilings(probe: Probe) -> None:
    """Large products and copies: what the rest can be compared with."""
    device, n = probe.device_type, 8192 if probe.on_gpu else 256
    a, b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
    rate(probe, f"product of {n} x {n}", 2.0 * n**3, milliseconds(device, lambda: a @ b), 0.7)
    source = torch.empty(1 << (31 if probe.on_gpu else 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / milliseconds(device, lambda: target.copy_(source)) / 1e9
    name = hopper(probe)
    bar = next((value for part, value in COPY_TB_S.items() if name and part in name), None)
    probe.number("copy, read and written", copied, "TB/s", at_least=bar)
    for preset, rows, share in (("1b", 16384, 0.40), ("100b", 4096, 0.55), ("1t", 4096, 0.60)):
        model = load_config(preset).model
        rows, dim, width = (rows, model.dim, model.ffn_dim) if probe.on_gpu else (64, 32, 64)
        x, w = torch.randn(rows, dim, device=device, dtype=BF16), torch.randn(width, dim, device=device, dtype=BF16)
        ms = milliseconds(device, partial(functional.linear, x, w))
        rate(probe, f"{preset}: product of its dense layers", 2.0 * rows * dim * width, ms, share)


def experts(probe: Probe) -> None:
    """The experts of a layer, forward and backward, at the rows that presets give them."""
    device = probe.device_type
    for preset, local, rows, share in (
        ("1b", 17, 131072, 0.35), ("1b", 136, 131072, 0.35), ("100b", 8, 32768, 0.50), ("1t", 4, 32768, 0.55),
    ):  # fmt: skip
        model = load_config(preset).model
        rows, dim, width = (rows, model.dim, model.expert_dim) if probe.on_gpu else (local * 4, 32, 16)
        with torch.device(device):
            layer = Experts(local, dim, width, Initializer(None), 0.02)
            x = torch.randn(rows, dim, dtype=BF16, requires_grad=True)
            counts = torch.full((local,), rows // local)
            counts[0] += rows - int(counts.sum())
        for parameter in layer.parameters():
            parameter.data = torch.randn_like(parameter.data, dtype=BF16) * 0.02
        grad = torch.randn_like(x)
        name, flops = f"{preset}, {local} experts", 6.0 * rows * dim * width

        def forward(layer: Experts = layer, x: Tensor = x, counts: Tensor = counts) -> Tensor:
            return layer(x, counts)

        def both(grad: Tensor = grad, run: Any = forward) -> None:
            run().backward(grad)

        with torch.no_grad():
            rate(probe, f"{name}: forward", flops, milliseconds(device, forward))
        rate(probe, f"{name}: forward and backward", 3 * flops, milliseconds(device, both), share)


def attention(probe: Probe) -> None:
    """Attention by torch's back ends, and as the model calls it without and with documents."""
    device = probe.device_type
    for preset, batch in (("1b", 4), ("1t", 1)):
        model = load_config(preset).model
        heads, width, v_width = (
            model.n_heads,
            (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0),
            model.v_head_dim or 0,
        )
        seq, documents = 4096, 28
        if not probe.on_gpu:
            batch, seq, heads, width, v_width, documents = 1, 64, 2, 24, 16, 5
        q, k, v = (
            torch.randn(batch, seq, heads, w, device=device, dtype=BF16, requires_grad=True)
            for w in (width, width, v_width)
        )
        flops = 2.0 * batch * heads * (width + v_width) * seq * seq / 2
        padded = functional.pad(v, (0, width - v_width))
        for name, backend in BACKENDS.items():
            for kind, values in (("native", v), ("padded", padded)):
                query, key, value = (x.detach().transpose(1, 2) for x in (q, k, values))
                try:
                    with sdpa_kernel(backend), torch.no_grad():
                        call = partial(functional.scaled_dot_product_attention, query, key, value, is_causal=True)
                        ms = milliseconds(device, call)
                except RuntimeError:
                    continue
                rate(probe, f"{preset}: {name}, {kind} values, forward", flops, ms)
        positions = document_positions(seq, documents, device, batch)
        times = {}
        for kind, bounds in (
            ("one document", None),
            (f"{documents} documents", DocumentBounds.from_positions(positions)),
        ):

            def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, bounds: Any = bounds, width: int = width) -> None:
                causal_attention(q, k, v, scale=width**-0.5, documents=bounds).sum().backward()

            times[kind] = milliseconds(device, both)
            probe.number(f"{preset}: the model's call, {kind}, forward and backward", times[kind], "ms")
        one, several = times.values()
        probe.number(f"{preset}: {documents} documents over one", several / one, "times")


def pieces(probe: Probe) -> None:
    """What lies between the products of a layer of 1b: time, and bytes that have to move over it."""
    device = probe.device_type
    model, tokens = (load_config("1b").model, 16384) if probe.on_gpu else (toy_run({"ep": 1, "stage": 1}, 1).model, 64)
    dim, torch_precision = model.dim, torch.get_float32_matmul_precision()
    state = torch.randn(tokens, dim, device=device)
    norm = RMSNorm(dim, model.norm_eps).to(device, BF16)
    with torch.no_grad():
        ms = milliseconds(device, lambda: norm(state))
        probe.number("RMSNorm of the fp32 state", (4 + 2) * state.numel() / ms / 1e6, "GB/s")
        filled = filled_model(model, device, BF16)
        router, feed = (
            filled.moe_layers()[0].router,
            FeedForward(dim, model.ffn_dim, Initializer(None), 0.02).to(device, BF16),
        )
        x = state.to(BF16)
        _, context = filled.encode(torch.zeros(1, tokens, dtype=torch.int64, device=device))
        times = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            times[precision] = milliseconds(device, partial(router, x, context.index_at(0).by_token(tokens)))
            probe.number(f"router, products of precision {precision!r}", times[precision], "ms")
        torch.set_float32_matmul_precision(torch_precision)
        probe.number("router, highest over high", times["highest"] / times["high"], "times")
        rate(probe, "dense SwiGLU, forward", 6.0 * tokens * dim * model.ffn_dim, milliseconds(device, lambda: feed(x)))
    hidden = x.detach().requires_grad_()
    weight = filled.lm_head.weight
    targets = torch.randint(0, model.vocab_size, (tokens,), device=device)
    ms = milliseconds(device, lambda: chunked_cross_entropy(hidden, weight, targets).backward())
    rate(probe, "head and cross-entropy, forward and backward", 6.0 * tokens * dim * model.vocab_size, ms)


def loop(probe: Probe) -> None:
    """One loop of 1b's four layers: kernels, how long the device waits for the host, and a trace for the record."""
    device = probe.device_type
    model, rows, seq = (
        (load_config("1b").model, 4, 4096) if probe.on_gpu else (toy_run({"ep": 1, "stage": 1}, 1).model, 2, 32)
    )
    made = filled_model(model, device, BF16)
    tokens = torch.randint(0, model.vocab_size, (rows, seq), device=device)
    e, context = made.encode(tokens, aux=AuxLoss(1e-4, 1e-5))
    e = e.detach().requires_grad_()

    def forward() -> Tensor:
        h, _ = made.start_loop(e, context=context)
        return made.step_loop(h, e, loop=0, context=context)[0]

    def both() -> None:
        forward().sum().backward()

    with torch.no_grad():
        probe.number("one loop, forward", milliseconds(device, forward), "ms")
    whole = milliseconds(device, both)
    probe.number("one loop, forward and backward", whole, "ms")
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if probe.on_gpu else [])
    with torch.profiler.profile(activities=kinds) as profile, torch.no_grad():
        forward()
    if not probe.on_gpu:
        ran = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
        probe.number("operations of a layer, forward", ran / model.recurrent_layers, at_least=1)
        return
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    probe.number("kernels of a layer, forward", len(kernels) / model.recurrent_layers, at_most=220, at_least=10)
    with torch.profiler.profile(activities=kinds) as profile:
        both()
        torch.cuda.synchronize()
    busy = sum(
        event.time_range.elapsed_us()
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    probe.number("device idle, forward and backward", max(0.0, 1 - busy / 1000 / whole), at_most=0.10)
    profile.export_chrome_trace(str(probe.folder / "loop_trace.json.gz"))


def training_run(probe: Probe, micro: int, checkpointing: str) -> RunConfig:
    """1b on one process, or a toy."""
    if not probe.on_gpu:
        return toy_run(
            {"ep": 1, "stage": 3, "dtype": "bfloat16", "checkpointing": checkpointing, "accumulation": 8 // micro}, 1
        )
    settings = [
        "parallel.ep_size=1", f"training.micro_batch_size={micro}", f"training.global_batch_size={micro}",
        f"parallel.activation_checkpointing={checkpointing}", "training.warmup_steps=0",
    ]  # fmt: skip
    return load_config("1b", settings).model_copy(update={"cluster": None})


def _batches(resolved: ResolvedRun, device: str, step: int) -> list[dict[str, Tensor]]:
    """Random text of few words, another in each of four steps, so that there is something to learn."""
    training, vocabulary = resolved.config.training, resolved.config.model.vocab_size
    generator = torch.Generator().manual_seed(step % 4)
    shape = (training.micro_batch_size, training.seq_len + 1)
    text = (torch.rand(shape, generator=generator) ** 4 * vocabulary).long()
    batch = {"tokens": text[:, :-1].to(device), "targets": text[:, 1:].to(device)}
    return [batch] * resolved.gradient_accumulation_steps


def built(resolved: ResolvedRun, probe: Probe) -> TrainingEngine:
    """The engine, its weights drawn on the device: numpy takes minutes for a billion."""

    def draw(_init: Initializer, tensor: Tensor, _name: str, std: float, *, expert: int | None = None) -> None:
        with torch.no_grad():
            tensor.normal_(0.0, std)

    groups = init_parallel(ProcessEnvironment.detect({}), resolved.ep_size, resolved.stages)
    with patch.object(Initializer, "normal_", draw):
        return build_engine(resolved, groups)


def step(probe: Probe) -> None:
    """Optimizer steps of 1b at its mean depth: tokens, model FLOPs, memory beside the plan."""
    layouts = ((1, "loop"), (2, "loop"), (4, "loop"), (4, "none")) if probe.on_gpu else ((4, "loop"), (8, "none"))
    for micro, checkpointing in layouts:
        if probe.on_gpu:
            gc.collect()  # an engine refers to itself: the former one would count as memory of this one
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        resolved = resolve(training_run(probe, micro, checkpointing), 1)
        engine = built(resolved, probe)
        _time_steps(probe, f"micro-batch {micro}, checkpointing {checkpointing}", engine, resolved, micro)
        engine.close()
        del engine


def _time_steps(probe: Probe, name: str, engine: TrainingEngine, resolved: ResolvedRun, micro: int) -> None:
    config, device = resolved.config, probe.device_type
    loops, grad_loops = config.model.mean_recurrence, resolved.mean_backprop_depth
    seconds = []
    for number in range(25 if probe.on_gpu else 2):
        batches = _batches(resolved, device, number)
        started = time.perf_counter()
        engine.train_step(batches, n_loops=loops, n_grad_loops=grad_loops, lr=1e-3, statistics=False)
        seconds.append(time.perf_counter() - started)
    middle = statistics.median(seconds[5:] if probe.on_gpu else seconds[1:])
    tokens = config.training.global_batch_size * config.training.seq_len
    cost = flops_per_token(config.model, context=config.training.seq_len, n_loops=loops, n_grad_loops=grad_loops)
    probe.number(f"{name}: a step", middle, "s")
    probe.number(f"{name}: tokens", tokens / middle, "tokens/s", at_least=1)
    gpu = hopper(probe)
    peak = peak_bf16(torch.cuda.get_device_name(0)) if probe.on_gpu else None
    if peak is not None:
        bar = 0.12 if gpu and micro == 4 else None
        probe.number(f"{name}: MFU", tokens * cost.training / middle / peak, at_least=bar)
    planned = {item.name: item.bytes for item in memory(resolved, on_gpu=probe.on_gpu).items}
    expected = sum(size for item, size in planned.items() if item not in _OUTSIDE)
    probe.number(f"{name}: memory by the plan", expected, "B", at_least=1)
    if probe.on_gpu:
        peak_bytes = torch.cuda.max_memory_allocated()
        probe.number(f"{name}: peak memory over the plan's", peak_bytes / expected, "times", at_most=1.1, at_least=0.9)


def learning(probe: Probe) -> None:
    """Thirty steps at a learning rate above zero: the loss falls, loads stay bounded."""
    resolved = resolve(training_run(probe, 2 if probe.on_gpu else 8, "loop"), 1)
    engine = built(resolved, probe)
    results: list[StepResult] = []
    count = 30 if probe.on_gpu else 8
    for number in range(count):
        lr = 1e-3 if probe.on_gpu else 1e-2
        batches = _batches(resolved, probe.device_type, number)
        results.append(engine.train_step(batches, n_loops=resolved.config.model.mean_recurrence, n_grad_loops=2, lr=lr))
    first, last = (statistics.mean(r.loss for r in part) for part in (results[:4], results[-4:]))
    unfinite = sum(not math.isfinite(value) for r in results for value in (r.loss, r.grad_norm))
    probe.number("values that are not finite", unfinite, equals=0)
    probe.number("loss of the last four steps over that of the first", last / first, at_most=0.98)
    loads = [load for r in results if isinstance(load := r.routing["router/load_max_mean"], float)]
    probe.number("load of the busiest expert over the mean", statistics.median(loads), at_most=4.0)
