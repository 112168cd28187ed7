"""ZeRO-3 gathers the weights that a module needs in the order of a set of parameters, which follows their addresses:
where they belong to two process groups, one rank gathers over the one first and another over the other.

torchrun --nproc_per_node 1 gather_order.py
"""

import random
import sys

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

TRIES = 60

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)
everybody, same_experts = comm.new_group([0]), comm.new_group([0])
METHOD = "_PartitionedParameterCoordinator__all_gather_params_"
issue = getattr(PartitionedParameterCoordinator, METHOD)
first: list[str] = []


def note(self, params, *options, **named):
    """Which group the first of the parameters is gathered over: the order of groups is that of the parameters."""
    first.append("experts" if params[0].ds_process_group is same_experts else "dense")
    return issue(self, params, *options, **named)


setattr(PartitionedParameterCoordinator, METHOD, note)


class Layer(nn.Module):
    """Dense weights, and experts' that other ranks hold too, among whatever else a process has in memory."""

    def __init__(self):
        super().__init__()
        self.among = []
        self.weights = nn.ParameterList()
        for _ in range(8):
            self.among += [nn.Parameter(torch.empty(0)) for _ in range(random.randrange(20))]
            dense, expert = nn.Parameter(torch.eye(4)), nn.Parameter(torch.eye(4))
            vars(expert).update(ds_zero_partition_group_name="experts", ds_zero_partition_process_group=same_experts)
            self.weights.extend([dense, expert])

    def forward(self, x):
        for weight in self.weights:
            x = x @ weight
        return x


zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
while len(set(first)) < 2 and len(first) < TRIES:
    with deepspeed.zero.Init(data_parallel_group=everybody, config_dict_or_path=settings):
        layer = Layer()
    set_z3_leaf_modules(layer, [Layer])
    engine, *_ = deepspeed.initialize(model=layer, config=settings)
    engine(torch.ones(1, 4))
    engine.destroy()
sys.stdout.write(f"gathered first in {len(first)} starts: {first}\n")
torch.distributed.destroy_process_group()
sys.exit(len(set(first)) < 2)
