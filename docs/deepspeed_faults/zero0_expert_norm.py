"""ZeRO stage 0 clips by a wrong norm when parameters differ between ranks (expert parallelism).

torchrun --nproc_per_node 2 zero0_expert_norm.py
"""

import sys

import deepspeed
import torch
from deepspeed import comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn


class Expert(AutoEPMoELayer):
    """One weight per rank, with the marks of an expert."""

    def __init__(self):
        nn.Module.__init__(self)
        self.num_experts, self.ep_group_name = 2, "ep_size_2"
        self.weight = nn.Parameter(torch.ones(1))
        vars(self.weight).update(allreduce=False, group_name="ep_size_2")


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)
groups._create_expert_and_data_parallel(2, mp_size=1, pp_size=1)
dense, expert = nn.Linear(1, 1, bias=False), Expert()
net = nn.ModuleDict({"dense": dense, "expert": expert})
config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}
optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
before = dense.weight.detach().clone()
# Gradients: dense 3; experts, averaged over the data, 4 on rank 0 and 12 on rank 1. Norm sqrt(9 + 16 + 144) = 13.
loss = 3 * dense(torch.ones(1, 1)) + (8, 24)[comm.get_rank()] * expert.weight
engine.backward(loss.sum())
engine.step()
clipped, expected = (before - dense.weight.detach()).item(), 3 / 13
sys.stdout.write(f"dense gradient after clipping {clipped:.4f}, by the global norm {expected:.4f}\n")
torch.distributed.destroy_process_group()
sys.exit(abs(clipped - expected) < 1e-3)
