"""What the checks need of a device: exact arithmetic, dirty memory, models that are filled there, time."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ActivationCheckpointing, ModelConfig
from mythos_ds.model.mythos import MythosModel

_POISONED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
_BLOCKS = 16


def relative(got: Tensor | None, wanted: Tensor | None) -> float:
    """|got - wanted| / |wanted| of whole tensors; |got| where zero is wanted; NaN where one is missing."""
    if got is None or wanted is None:
        return float("nan")
    norm = wanted.double().norm()
    error = (got.double() - wanted.double()).norm()
    return (error / norm if norm > 0 else error).item()


def poison(device: str) -> None:
    """Fill memory that the allocator gives out next with NaN: what a kernel does not write shows."""
    size = _POISONED_BYTES[device] // _BLOCKS // 4
    blocks = [torch.full((size,), float("nan"), device=device) for _ in range(_BLOCKS)]
    blocks += [torch.full((n,), float("nan"), device=device) for n in (256, 4096, 65536) for _ in range(8)]
    del blocks


@contextmanager
def exact() -> Iterator[None]:
    """fp32 products in fp32 (no TF32), and sums in an order that does not vary where torch has one."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
        torch.use_deterministic_algorithms(False)


def filled_model(
    config: ModelConfig,
    device: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> MythosModel:
    """A model with no weight at zero, drawn on the device; its buffers stay fp32."""
    with torch.device(device):
        model = MythosModel(config, seed=None, activation_checkpointing=activation_checkpointing)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter.data)
        parameter.data += noise * (0.02 if parameter.dim() > 1 else 0.1)
        parameter.data = parameter.data.to(dtype)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the last backward by name, which are taken away."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def milliseconds(device: str, work: Callable[[], object], *, repeats: int = 20, warm_up: int = 5) -> float:
    """The median time of `work` by the device's own clock; on the CPU of few repeats."""
    if device == "cpu":
        repeats, warm_up = min(repeats, 3), 1
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - started))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)
