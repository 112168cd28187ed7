"""Which tensors a model's configuration demands, and whether given ones are these."""

from collections.abc import Mapping

import torch

from mythos_ds.config.schema import ModelConfig
from mythos_ds.errors import TensorMismatchError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.reader import TensorSpec

_SHOWN = 100


def expected_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """What the folder of such a model holds, in order and in fp32; no memory is taken. Raises CheckpointError for sizes
    that no tensor can have."""
    try:
        with torch.device("meta"):
            state = MythosModel(config).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        said = str(error).partition("\n")[0][:_SHOWN]
        raise TensorMismatchError(f"the configuration's sizes are those of no model ({said})") from error
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return {name: TensorSpec(torch.float32, tuple(v.shape)) for name, v in state.items() if name not in tied}


def check_whole(given: Mapping[str, TensorSpec], config: ModelConfig, may_lack: tuple[str, ...] = ()) -> None:
    """The rule that every route asks for before it writes: exactly the tensors that the configuration demands, each of
    the shape that it demands, of floating-point numbers.

    may_lack: ends of names that need not be there. Raises CheckpointError at the first tensor that breaks it.
    """
    layers = config.prelude_layers + config.recurrent_layers + config.coda_layers
    if layers > len(given):  # told before they are built: a number may be any
        raise TensorMismatchError(
            f"the configuration demands {layers:,} layers; the given weights are {len(given)} tensors"
        )
    wanted = expected_specs(config)
    if unknown := sorted(set(given) - set(wanted)):
        raise TensorMismatchError(f"{unknown[0]}: not a tensor of this configuration ({len(unknown)} such tensors)")
    missing = [name for name in wanted if name not in given and not name.endswith(may_lack)]
    if missing:
        raise TensorMismatchError(
            f"{missing[0]}: not in the given weights ({len(missing)} of {len(wanted)} are missing)"
        )
    for name, spec in given.items():
        if spec.shape != wanted[name].shape:
            said = f"the configuration says {wanted[name].shape}"
            raise TensorMismatchError(f"{name}: has the shape {spec.shape}, {said}")
        if not spec.dtype.is_floating_point:
            raise TensorMismatchError(f"{name}: is {spec.dtype}; allowed: floating-point numbers")
