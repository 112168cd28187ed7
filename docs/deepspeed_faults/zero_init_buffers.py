"""zero.Init with bf16 casts buffers; keep_in_fp32_modules restores the dtype but not the value.

torchrun --nproc_per_node 1 zero_init_buffers.py
"""

import sys

import deepspeed
import torch
from torch import nn

VALUE = 1.0 + 2.0**-12


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.register_buffer("table", torch.full((4,), VALUE, dtype=torch.float32))


def buffer_under_zero_init(**extra):
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path={**config, **extra}):
        return Table().table


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # do not compile it at start-up
deepspeed.init_distributed(verbose=False)
plain = buffer_under_zero_init()
kept = buffer_under_zero_init(data_types={"keep_in_fp32_modules": ["table"]})
sys.stdout.write(f"plain {plain.dtype} {plain[0].item()}; kept {kept.dtype} {kept[0].item()}; written {VALUE}\n")
torch.distributed.destroy_process_group()
sys.exit(not (plain.dtype == torch.bfloat16 and kept.dtype == torch.float32 and kept[0].item() != VALUE))
