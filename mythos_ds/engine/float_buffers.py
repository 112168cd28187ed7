"""Buffers that must stay float32 under `zero.Init`."""

import torch

from mythos_ds.errors import ParallelError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import Router


def restore_float_buffers(model: MythosModel, device: torch.device) -> None:
    """Gives the routers' buffers back their dtype and initial value.

    `zero.Init` with bf16 casts every tensor made under it, buffers too, and their values are lost; DeepSpeed's
    `keep_in_fp32_modules` brings back the dtype only. Raises ParallelError where a buffer that this function does not
    know of is not fp32.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        for name, buffer in list(router.named_buffers(recurse=False)):
            setattr(router, name, torch.zeros(buffer.shape, dtype=torch.float32, device=device))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise ParallelError(f"buffer {name} is {buffer.dtype}; the model's buffers must stay float32.")
