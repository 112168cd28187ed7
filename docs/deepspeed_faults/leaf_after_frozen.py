"""ZeRO-3 averages a leaf's gradients before they are computed where no input of the leaf has a gradient, as behind
frozen layers: its backward hook then fires with the gradient of the leaf's output.

torchrun --nproc_per_node 1 leaf_after_frozen.py
"""

import sys

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)


class Leaf(nn.Module):
    """A layer that is gathered as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(x)
        return made


def moved(*, frozen: bool) -> float:
    """How far one step of SGD moves the leaf's matrix."""
    torch.manual_seed(0)
    leaf = Leaf()
    net = nn.Sequential(nn.Linear(4, 4).requires_grad_(not frozen), leaf)
    set_z3_leaf_modules(net, [Leaf])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    weight = leaf.inner.weight
    with deepspeed.zero.GatheredParameters([weight]):
        before = weight.detach().clone()
    engine.backward(engine(torch.ones(1, 4)).square().sum())
    engine.step()
    with deepspeed.zero.GatheredParameters([weight]):
        return float((weight.detach() - before).abs().max())


plain = moved(frozen=False)
try:
    behind = f"{moved(frozen=True):.4f}"
except RuntimeError as error:  # the gradient that comes later fits no weight any more
    behind = f"an error ({error})"
sys.stdout.write(f"a step moves the leaf by {plain:.4f}; behind a frozen layer by {behind}\n")
torch.distributed.destroy_process_group()
sys.exit(not (plain > 0.01 and behind != f"{plain:.4f}"))
