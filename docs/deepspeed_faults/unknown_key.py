"""A misspelt top-level key of the configuration is ignored without a word.

torchrun --nproc_per_node 1 unknown_key.py
"""

import sys

import deepspeed
import torch
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)
net = nn.Linear(4, 4)
config = {"train_micro_batch_size_per_gpu": 1, "gradient_cliping": 0.25}
engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=config)
sys.stdout.write(f"asked for clipping at 0.25, got {engine.gradient_clipping()}\n")
torch.distributed.destroy_process_group()
sys.exit(engine.gradient_clipping() == 0.25)
