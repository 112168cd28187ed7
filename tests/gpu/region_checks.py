"""Compiled regions on the device: the numbers they give as written, no graph for each depth, and what they save."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mythos_ds.api import load_config
from mythos_ds.bench.acceptance import Probe
from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.regions import compile_regions, compiler_problem
from mythos_ds.model.context import AuxLoss
from tests.gpu.devices import exact, filled_model, gradients, milliseconds, relative
from tests.gpu.model_checks import batch_of
from tests.helpers.toy_model import toy_model

AUX = AuxLoss(balance=0.3, z=0.02, scale=1.0)
MAX_KERNELS = 120
"""Of a layer of 1b forward, compiled: 62 launches, of which sorts and choices are several kernels each."""


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """Regions compiled by the inductor, or as written."""
    compile_regions("inductor" if on else None)
    try:
        yield
    finally:
        compile_regions(None)


def _step(config: ModelConfig, device: str, dtype: torch.dtype, n_loops: int, seq: int) -> tuple[Tensor, ...]:
    model = filled_model(config, device, dtype, activation_checkpointing="loop")
    loss = model(**batch_of(config, device, 2, seq), n_loops=n_loops, n_grad_loops=2, aux=AUX)
    loss.backward()
    return loss.detach(), *gradients(model).values()


def numerics(probe: Probe) -> None:
    """fp32 to rounding; bf16 no farther from fp32 than as written."""
    device, config = probe.device_type, toy_model()
    probe.note("why nothing compiles", compiler_problem(torch.device(device)))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for on in (False, True):
            with exact(), compiled(on):
                results[dtype, on] = _step(config, device, dtype, 3, 32)
    plain, made = results[torch.float32, False], results[torch.float32, True]
    probe.number("fp32: loss, relative", relative(made[0], plain[0]), at_most=1e-6)
    worst = max((got - want).abs().max() / want.abs().max() for got, want in zip(made, plain, strict=True))
    probe.number("fp32: worst gradient, of its largest element", float(worst), at_most=5e-6)
    far = [
        sum(relative(got, want) for got, want in zip(results[torch.bfloat16, on][1:], plain[1:], strict=True))
        for on in (True, False)
    ]
    probe.number("bf16: distance of gradients from fp32, over that as written", far[0] / far[1], at_most=1.2)


def graphs(probe: Probe) -> None:
    """Depths and rows that were not seen before are run by the graphs that are there."""
    device, config = probe.device_type, toy_model()
    counters = torch._dynamo.utils.counters["stats"]
    with compiled(True):
        for n_loops, seq in ((4, 32), (2, 48), (5, 40)):
            _step(config, device, torch.bfloat16, n_loops, seq)
        before = counters["unique_graphs"]
        for n_loops, seq in ((3, 64), (7, 56), (6, 24)):
            _step(config, device, torch.bfloat16, n_loops, seq)
    probe.number("graphs", before, at_least=1, at_most=80)
    probe.number("graphs added by other depths and rows", counters["unique_graphs"] - before, equals=0)


def speed(probe: Probe) -> None:
    """One loop of 1b's four layers, as written and compiled: time, and kernels of a layer."""
    device, config = probe.device_type, load_config("1b").model
    model = filled_model(config, device, torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (4, 4096), device=device)
    e, context = model.encode(tokens, aux=AuxLoss(1e-4, 1e-5))
    e = e.detach().requires_grad_()

    def forward() -> Tensor:
        h, _ = model.start_loop(e, context=context)
        return model.step_loop(h, e, loop=2, context=context)[0]

    def both() -> None:
        forward().sum().backward()

    times = {}
    for on in (False, True):
        name = "compiled" if on else "as written"
        with compiled(on):
            with torch.no_grad():
                probe.number(f"one loop, forward, {name}", milliseconds(device, forward), "ms")
            times[on] = milliseconds(device, both)
            probe.number(f"one loop, forward and backward, {name}", times[on], "ms")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, torch.no_grad():
                forward()
                torch.cuda.synchronize()
        ran = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        limit = MAX_KERNELS if on else None
        probe.number(f"kernels of a layer, forward, {name}", ran / config.recurrent_layers, at_most=limit)
    probe.number("time as written over compiled", times[False] / times[True], "times", at_least=1.2)
