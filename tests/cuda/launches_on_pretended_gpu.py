"""Counts what a loop of a preset launches on a GPU, in a process of its own, as model_on_pretended_gpu.py does.

Regions are taken for compiled: a call of one runs nothing here and is noted by its arguments, from which
tests/helpers/region_costs.py tells the kernels of its forward and backward. Prints one line of JSON.
"""

import ctypes
import json
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_ds.config.loader import load_config
from mythos_ds.kernels import attention, regions
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from tests.cuda.model_on_pretended_gpu import Kernels, on_gpu
from tests.helpers.region_calls import Call, described

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "alias",
    "split_with_sizes", "permute", "detach", "as_strided", "unbind", "empty", "empty_like", "new_empty", "unfold",
    "_reshape_alias", "lift_fresh", "empty_strided", "new_empty_strided", "device",
}  # fmt: skip
"""Operators that launch no kernel."""


class Launches(TorchDispatchMode):
    """Counts operators outside regions, their bytes, and the calls of regions: forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0
        self.forward: Counter[Call] = Counter()
        self.backward: Counter[Call] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.paused and name not in VIEWS:
            self.names[name] += 1
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class _TakenForCompiled(torch.autograd.Function):
    """A region's results without its operators; in backward a gradient for each argument that wants one."""

    @staticmethod
    def forward(ctx: Any, watch: Launches, call: Call, function: Callable[..., Any], *arguments: Any) -> Any:
        watch.paused = True
        out = function(*arguments)
        watch.paused = False
        watch.forward[call] += 1
        ctx.watch, ctx.call = watch, call
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))
        several = out if isinstance(out, tuple) else (out,)
        ctx.mark_non_differentiable(*(x for x in several if not x.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.watch.backward[ctx.call] += 1
        given = [None if x is None or not x.is_floating_point() else torch.empty_like(x) for x in ctx.saved_tensors]
        return None, None, None, *given


class _Regions(dict[Any, Any]):
    """In the place of the process's compiled regions: notes calls."""

    def __init__(self, watch: Launches) -> None:
        super().__init__()
        self.watch = watch

    def get(self, key: Any, default: Any = None) -> Any:
        function, *constants = key
        own = dict(constants)

        def call(*arguments: Any) -> Any:
            noted = described(function, own, arguments)
            return _TakenForCompiled.apply(self.watch, noted, lambda *tensors: function(*tensors, **own), *arguments)

        return call


def counted(model: MythosModel, tokens: Tensor, loops: int, graded: int) -> tuple[Launches, Launches]:
    """The launches of a forward and of its backward."""
    forward, backward = Launches(), Launches()
    options: dict[str, Any] = {"n_loops": loops, "n_grad_loops": graded, "targets": tokens}
    aux, records = AuxLoss(1e-4, 1e-5, 0.0, 1.0), ForwardRecords()
    # This mode is to see the regions, not what is inside.
    with patch.object(regions._Compiler, "backend", "noted"), patch.object(regions, "_is_watched", lambda _: False):
        with patch.object(regions._Compiler, "compiled", _Regions(forward)), forward:
            loss = model(tokens, aux=aux, records=records, **options)
        # Regions of the recompute, and the backward of those of the forward.
        known = (forward.forward.copy(), forward.names.copy(), forward.bytes)
        with patch.object(regions._Compiler, "compiled", _Regions(backward)), backward:
            loss.backward()
    backward.backward += forward.backward
    forward.backward.clear()
    forward.forward, forward.names, forward.bytes = known
    return forward, backward


def per_layer(more: Launches, fewer: Launches, layers: int) -> dict[str, Any]:
    """What one more loop takes, by layer."""
    difference = Launches()
    difference.names = more.names - fewer.names
    share = {"launches": difference.names.total() / layers, "bytes": (more.bytes - fewer.bytes) / layers}
    names = {name: count / layers for name, count in difference.names.most_common()}
    calls = [more.forward - fewer.forward, more.backward - fewer.backward]
    kinds = [{call: count / layers for call, count in counter.items()} for counter in calls]
    return {**share, "names": names, "forward": kinds[0], "backward": kinds[1]}


def main(preset: str, output: str) -> None:
    config = load_config(f"{preset}.json", []).config
    training, kernels = config.training, Kernels(cudnn=False)
    with torch.device("meta"):
        model: nn.Module = MythosModel(config.model, activation_checkpointing="loop")
    with (
        FakeTensorMode(),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.multiple(attention, **kernels.answers()),
        patch.object(attention.functional, "scaled_dot_product_attention", kernels.attend),
    ):
        on_gpu(model)
        tokens = torch.zeros(training.micro_batch_size, training.seq_len, dtype=torch.int64, device="cuda")
        runs = {key: counted(model, tokens, *key) for key in ((2, 1), (3, 1), (3, 2))}  # type: ignore[arg-type]
    layers = config.model.recurrent_layers
    found = {
        "forward": per_layer(runs[3, 1][0], runs[2, 1][0], layers),
        "backward": per_layer(runs[3, 2][1], runs[3, 1][1], layers),
    }
    Path(output).write_bytes(pickle.dumps(found))
    summary = {name: {key: own[key] for key in ("launches", "bytes", "names")} for name, own in found.items()}
    sys.stdout.write(json.dumps(summary) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the engine's thread for the device would not end


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3])
