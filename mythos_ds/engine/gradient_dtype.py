"""In what type the gradients of a weight add up.

A looped weight's gradient is a sum over loops, in a pipeline over micro-batches too. In bf16 each addition rounds: the
sum of 32 gradients is then off by 0.7 %, of one that is added up in fp32 and rounded at the end by 0.2 %.
"""

from collections.abc import Iterable

import torch
from torch import nn

from mythos_ds.config.schema import TrainingConfig
from mythos_ds.errors import Coded, ConfigError


def adds_up_in_float32(training: TrainingConfig) -> bool:
    """Whether gradients of weights in bf16 add up in fp32."""
    return training.dtype == "bfloat16" and training.grad_dtype == "float32"


def require_float32_sums(training: TrainingConfig) -> None:
    """Raises ConfigError where the run adds gradients up in fp32 and this torch knows no gradient of another type than
    its weight's."""
    if not adds_up_in_float32(training) or hasattr(torch.Tensor, "grad_dtype"):
        return
    message = (
        f'training.grad_dtype: "float32", which torch {torch.__version__} cannot do for weights in bfloat16; allowed: '
        'a torch whose tensors have grad_dtype, or "bfloat16", which loses digits over the loops; nearest: '
        "training.grad_dtype=bfloat16"
    )
    raise ConfigError([Coded("MDS730", message)])


def add_up_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Lets the gradients of `parameters` be fp32: autograd casts each addend, then adds. To be called before the first
    backward."""
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
