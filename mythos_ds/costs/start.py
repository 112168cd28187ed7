"""What a run needs of the machine at the least, known before anything is built. No torch."""

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.params import count_parameters
from mythos_ds.errors import Coded, ConfigError
from mythos_ds.formatting import byte_text, number_text

_MASTER_BYTES = 4
SAMPLE_BYTES = 12
"""Of the index, per sample: where it begins (two int32) and its place in the order (uint32)."""


def require_room(resolved: ResolvedRun, memory_bytes: float, local_processes: int, *, on_cpu: bool) -> None:
    """Raises ConfigError where the machine's memory cannot hold even the smallest part of what training needs.

    memory_bytes: of the machine; on_cpu: whether the model is in it too, and not on GPUs.
    """
    training, model = resolved.config.training, resolved.config.model
    here = f"; this machine has {byte_text(memory_bytes)}"
    problems = []
    lengths = {
        "training.max_steps": ("samples of the run", resolved.total_samples),
        "training.eval_batches": ("samples of an evaluation", training.eval_batches * training.global_batch_size),
    }
    for key, (what, samples) in lengths.items():
        if samples * SAMPLE_BYTES > memory_bytes:
            needed = byte_text(samples * SAMPLE_BYTES)
            problems.append(f"{key}: the order of {number_text(samples)} {what} takes {needed}{here}; give fewer")
    share = local_processes / resolved.world_size
    total = count_parameters(model).total
    if on_cpu and total * _MASTER_BYTES * share > memory_bytes:
        needed = byte_text(total * _MASTER_BYTES * share)
        problems.append(
            f"model: {number_text(total)} parameters in float32 take {needed} on the {local_processes} of "
            f"{resolved.world_size} processes that are here{here}; give a smaller model or more machines"
        )
    state = (
        local_processes * min(stage.rows for stage in resolved.stages) * training.seq_len * model.dim * _MASTER_BYTES
    )
    if on_cpu and state > memory_bytes:
        problems.append(
            f"training.micro_batch_size: the residual stream of one micro-batch takes {byte_text(state)}{here}; "
            "give fewer or shorter sequences"
        )
    if problems:
        raise ConfigError([Coded("MDS162", problem) for problem in problems])
