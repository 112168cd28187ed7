"""Runs models on fake tensors of device "cuda", in a process of its own: the library that stands for a GPU is loaded
before torch. Prints what went wrong, one finding per line of JSON."""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels import attention
from mythos_ds.kernels.segments import DocumentBounds
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel

BATCH, SEQ = 2, 32
LOOPS, GRAD_LOOPS = 3, 2
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}
"""Operators whose result the host must have, or whose size it must know."""


class Watch(TorchDispatchMode):
    """Notes operators that wait for the device, and those that see a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: list[str] = []
        self.operators = 0
        self.groups: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if name == "_grouped_mm" and out.dim() == 2:
            self.groups.add(len(out))
        if name in WAITS:
            self.findings.append(f"{name} waits for the device")
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if devices - {"cuda"}:
            self.findings.append(f"{name} with tensors on {sorted(devices)}")
        return out


class _AsManyRows(Experts):
    """The experts of one of ep_size processes; as many rows come as go. `fault` puts one in."""

    ep_size, fault = 1, ""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self.fault == "wait":
            counts.tolist()
        if self.fault == "processor":
            rows = rows * torch.ones((), dtype=rows.dtype)
        if self.fault == "gradient":
            return rows.detach() * self.w1.detach().sum()
        return super().forward(rows, counts.view(self.ep_size, -1).sum(0))


class OwnExperts(MoE):
    """The mixture with such experts."""

    ep_size, fault = 1, ""

    def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
        made = _AsManyRows(config.n_experts // self.ep_size, config.dim, config.expert_dim, init, 0.0)
        made.ep_size, made.fault = self.ep_size, self.fault
        return made


class Kernels:
    """The attention kernels of a GPU, of which choosing one asks the driver; notes what each is called with."""

    def __init__(self, *, cudnn: bool):
        self.calls: set[str] = set()
        self.cudnn = cudnn
        self.chosen: SDPBackend | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        """What scaled_dot_product_attention comes to."""
        self.calls.add(f"{'flash' if self.chosen is None else self.chosen.name} {q.shape[-1]} {v.shape[-1]}")
        result: Tensor
        if self.chosen == SDPBackend.CUDNN_ATTENTION:
            options = None, torch.is_grad_enabled(), 0.0, is_causal
            result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, *options, scale=scale)[0]
        else:
            result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        return result

    @contextmanager
    def only(self, backend: SDPBackend) -> Iterator[None]:
        """What sdpa_kernel does."""
        self.chosen = backend
        yield
        self.chosen = None

    def answers(self) -> dict[str, Any]:
        """What takes the places of torch's functions in the module of attention."""
        return {
            "sdpa_kernel": self.only,
            "can_use_cudnn_attention": lambda _: self.cudnn,
            "can_use_flash_attention": lambda _: True,
            "_BACKENDS": {},
        }


def on_gpu(model: nn.Module) -> None:
    """Fake parameters in bf16, buffers as they are."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = torch.empty(parameter.shape, device="cuda", dtype=torch.bfloat16)
            setattr(module, name, nn.Parameter(own))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of one preset."""
    config = load_config(f"{case['preset']}.json", []).config.model
    moe: type[MoE] = type("Local", (OwnExperts,), {"ep_size": case["ep_size"], "fault": case.get("fault", "")})
    kernels = Kernels(cudnn=case.get("cudnn", False))
    with torch.device("meta"):
        model = MythosModel(config, moe_factory=moe, activation_checkpointing=case["checkpointing"])
    positions = (torch.arange(SEQ) % 20).expand(BATCH, SEQ) if case["documents"] else None
    bounds = None if positions is None else DocumentBounds.from_positions(positions)
    with FakeTensorMode() as mode:
        on_gpu(model)
        tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64, device="cuda")
        positions = None if positions is None else mode.from_tensor(positions).cuda()
        bounds = None if bounds is None else moved(bounds, mode)
        watch = Watch()
        with (
            patch.object(DocumentBounds, "from_positions", lambda *_: bounds),
            patch.multiple(attention, **kernels.answers()),
            patch.object(attention.functional, "scaled_dot_product_attention", kernels.attend),
            watch,
        ):
            try:
                loss = model(
                    tokens,
                    n_loops=LOOPS,
                    n_grad_loops=GRAD_LOOPS,
                    targets=tokens,
                    positions=positions,
                    aux=AuxLoss(1e-4, 1e-5, 0.0, 1.0),
                    records=ForwardRecords(details=case["details"]),
                )
                loss.backward()
            except DataDependentOutputException as error:  # fake tensors have no values to wait for
                watch.findings.append(f"{error.func} waits for the device")
    missing = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or p.grad.device.type != "cuda" or p.grad.dtype != p.dtype
    ]
    return {
        "case": case,
        "findings": sorted(set(watch.findings)),
        "without_gradient": missing,
        "operators": watch.operators,
        "attention": sorted(kernels.calls),
        "groups": sorted(watch.groups),
    }


def moved(bounds: DocumentBounds, mode: FakeTensorMode) -> DocumentBounds:
    """Bounds that were read off on the CPU, on the device."""
    fake = [mode.from_tensor(tensor) for tensor in (bounds.cu_seqlens, bounds.order, bounds.inverse)]
    return DocumentBounds(fake[0], fake[1], fake[2], bounds.runs).to(torch.device("cuda"))


def main(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        capability = tuple(case.get("capability", (9, 0)))
        with patch.object(torch.cuda, "get_device_capability", lambda *_, found=capability: found):
            sys.stdout.write(json.dumps(run(case)) + "\n")
            sys.stdout.flush()
    os._exit(0)  # the engine's thread for the device would not end


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
