"""The conditioning of the looped block on the loop's index: an index embedding and a depth-wise LoRA.

Both are defined for loops beyond the trained range: they hold their last value.
"""

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.injection import scaled_sinusoid, sinusoid
from mythos_ds.kernels.norm import plain_rms_norm
from mythos_ds.model.initializer import Initializer, Linear
from mythos_ds.model.loop_index import LoopIndex

_RAW_SHARE = 8


class LoopEmbedding(nn.Module):
    """`scaled`: a sinusoid of the loop index with a learned per-channel gain that starts at zero, held at the mean
    recurrence (an unheld sinusoid of full size breaks depth extrapolation). `raw`: OpenMythos's, on dim/8 channels."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dim = config.dim
        self.last = config.mean_recurrence - 1
        self.gain = nn.Parameter(torch.zeros(config.dim)) if config.loop_embedding == "scaled" else None

    def forward(self, h: Tensor, loop: LoopIndex) -> Tensor:
        """Computes what is added to the state h [batch, seq, dim]: fp32 [dim], or [batch, 1, dim]."""
        if self.gain is not None:
            return scaled_sinusoid(self.gain, loop.held(self.last).value)
        width = self.dim // _RAW_SHARE
        return nn.functional.pad(sinusoid(loop.value, width, h.device), (0, self.dim - width))


class DepthwiseLoRA(nn.Module):
    """up(scale[t] * down(x)): matrices shared by all loops, a scale vector per loop (Bae et al. 2024)."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        rank, self.eps = config.lora_rank, config.norm_eps
        self.normed = config.lora_target == "input"
        self.down = Linear(config.dim, rank, init.at("down"), config.resolved_init_std)
        self.up = Linear(rank, config.dim, init.at("up"), 0.0)
        self.scale = nn.Parameter(torch.ones(config.max_loops, rank))

    def forward(self, x: Tensor, loop: LoopIndex) -> Tensor:
        """Computes the branch that is added to x [batch, seq, dim]; at the block's input it sees x / rms(x)."""
        dtype = self.down.weight.dtype
        inner = plain_rms_norm(x, eps=self.eps, dtype=dtype) if self.normed else x.to(dtype)
        return self.up(self.down(inner) * loop.held(self.scale.shape[0] - 1).pick(self.scale))
