"""What runs inside the processes of test_guards.py: the two silent faults of ZeRO-3 with a block that is run several
times, on modules of a few lines, beside the arrangement that this package uses."""

import os
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos_ds.environment import ProcessEnvironment
from mythos_ds.parallel.groups import init_parallel

WIDTH, LOOPS = 16, 4


class Block(nn.Module):
    """The iterated block."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return self.decay * h + e + self.outer(torch.tanh(self.inner(h + e)))


class Loop(nn.Module):
    """Owns the loop over one block."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.block = Block()
        self.recompute = recompute

    def forward(self, e: Tensor) -> Tensor:
        h = torch.zeros_like(e)
        for _ in range(LOOPS):
            if self.recompute == "none":
                h = self.block(h, e)
            else:
                h = checkpoint(self.block, h, e, use_reentrant=self.recompute == "reentrant")
        return h


class Net(nn.Module):
    """Input map, loop, output map, squared error."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.loop = Loop(recompute)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.last(self.loop(self.first(x))) - y).square().mean()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, WIDTH, generator=generator), torch.randn(8, 1, generator=generator)


def _true_gradients() -> dict[str, Tensor]:
    net = Net("none")
    net(*_data()).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def _zero3_gradients(recompute: str, leaves: list[type[nn.Module]]) -> dict[str, Tensor]:
    """The same gradients from one step of SGD with learning rate 1 under ZeRO-3; every rank has the same data."""
    net = Net(recompute)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    if leaves:
        set_z3_leaf_modules(net, leaves)
    config = {
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        # The bucket is smaller than any parameter, as it is in a large model; where one bucket happens to hold a
        # parameter twice, DeepSpeed raises an assertion instead.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1},
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(*_data()))
    engine.step()
    gradients = {}
    for name, parameter in net.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            gradients[name] = before[name] - parameter.detach()
    engine.destroy()
    return gradients


def _error(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative error of any parameter's gradient."""
    return max(((gradients[name] - true).norm() / true.norm()).item() for name, true in truth.items())


def gradient_errors() -> dict[str, Any]:
    """Relative error of the block's gradient for each arrangement."""
    init_parallel(ProcessEnvironment.detect(os.environ), 1, timeout_s=60.0)
    truth = _true_gradients()
    arrangements: dict[str, tuple[str, list[type[nn.Module]]]] = {
        "loop is the leaf, non-reentrant": ("non-reentrant", [Loop]),
        "loop is the leaf, no recompute": ("none", [Loop]),
        "no leaf, non-reentrant": ("non-reentrant", []),
        "no leaf, reentrant": ("reentrant", []),
        "iterated block is the leaf": ("none", [Block]),
        "iterated block is the leaf, non-reentrant": ("non-reentrant", [Block]),
    }
    return {
        name: _error(_zero3_gradients(recompute, leaves), truth) for name, (recompute, leaves) in arrangements.items()
    }
