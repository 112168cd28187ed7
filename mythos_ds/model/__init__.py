"""The model as single-device code: no torch.distributed, no deepspeed."""
