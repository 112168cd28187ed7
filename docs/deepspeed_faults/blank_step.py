"""Stage 0 in bf16 takes an optimizer step with zero gradients while it is built: Adam's counter starts at 1, and the
weights decay once.

torchrun --nproc_per_node 1 blank_step.py
"""

import sys

import deepspeed
import torch
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)
net = nn.Linear(4, 4)
before = net.weight.detach().clone().bfloat16().float()
config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
steps = [int(state["step"]) for state in engine.optimizer.optimizer.state.values()]
master = next(p for group in engine.optimizer.fp32_groups for p in group if p.shape == before.shape)
shrunk = (master.detach() / before).mean().item()
sys.stdout.write(f"before the first step: Adam's counters {steps}, master weights times {shrunk:.3f}\n")
torch.distributed.destroy_process_group()
sys.exit(not (1 in steps and shrunk < 0.99))
