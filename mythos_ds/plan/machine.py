"""The GPUs that a plan is for. No torch: wrong arguments need not wait for it."""

from collections.abc import Sequence
from dataclasses import replace

from mythos_ds.config.schema import PROCESSES, RunConfig
from mythos_ds.config.training_stages import STAGES, TrainingStage
from mythos_ds.errors import OptionError
from mythos_ds.hardware import GPUS, Gpu, read_gpu


def machine(config: RunConfig, gpus: int | None, gpu: str | None) -> tuple[int, Gpu]:
    """Number and kind of GPUs. Raises ConfigError where neither the arguments nor the configuration say."""
    cluster = config.cluster
    kind = cluster.gpu if gpu is None and cluster is not None else gpu
    count = cluster.nodes * cluster.gpus_per_node if gpus is None and cluster is not None else gpus
    if count is None or kind is None:
        raise OptionError("--gpus and --gpu: not given, and the configuration names no cluster")
    if not 1 <= count <= PROCESSES:
        raise OptionError(f"--gpus: given {count}; allowed: 1 to {PROCESSES}; nearest: {min(max(1, count), PROCESSES)}")
    found = read_gpu(kind)
    if cluster is not None and found.name in GPUS:
        found = replace(found, gpus_per_node=cluster.gpus_per_node)
    return count, found


def require_own_length(option: str, tokens: object, stages: Sequence[TrainingStage]) -> None:
    """Raises ConfigError for tokens of the run where each of its training stages has a length of its own."""
    if tokens is not None and stages[0].name is not None:
        key = f"{STAGES}.{stages[0].name}.training.max_tokens"
        raise OptionError(f"{option}: given {tokens}; the file lists training stages; write {key}=...")
