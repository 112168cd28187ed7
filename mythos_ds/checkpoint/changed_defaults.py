"""What a run that goes on does otherwise because a default has changed since its checkpoint was written."""

from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.layout import is_pipelined
from mythos_ds.config.schema import RunConfig


def gradient_types_note(state: TrainingState, config: RunConfig) -> str | None:
    """Where gradients of bf16 weights were bf16 by default when `state` was saved: what is fp32 now, and the settings
    that keep what was. None once a checkpoint has `training.grad_dtype`."""
    before, training = state.config["training"], config.training
    if "grad_dtype" in before or {before.get("dtype", training.dtype), training.dtype} != {"bfloat16"}:
        return None
    changed = {}
    # A pipeline added them up in fp32 then too, and can do nothing else now.
    pipelined = state.layout.get("pp_size", 1) != 1 or is_pipelined(config.parallel)
    if not pipelined and "grad_dtype" not in training.model_fields_set:
        changed["training.grad_dtype=bfloat16"] = "add up over loops"
    if config.deepspeed.get("communication_data_type") is None:
        changed["deepspeed.communication_data_type=bf16"] = "are averaged over ranks"
    if not changed:
        return None
    what, kept = " and ".join(changed.values()), " ".join(changed)
    return f"gradients of bf16 weights {what} in fp32 now, and in bf16 when it was saved; to keep that: {kept}"
