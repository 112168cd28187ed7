"""Which indexes of samples a run will look for, from where it starts to the end of its last training stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.resolve import ResolvedStage
from mythos_ds.train.data_loader import needed_arguments
from mythos_ds.train.resume import where_to_start
from mythos_ds.train.run_changes import RunNames, StageEnd, begin_stage


@dataclass(frozen=True)
class IndexRequest:
    """The arguments of `prepare_index_cache` beside the settings of a training stage's data."""

    stage: ResolvedStage
    arguments: dict[str, int]


def index_requests(
    stages: Sequence[ResolvedStage], tag: Path | None, names: RunNames, new_stage: str | None = None
) -> Iterator[IndexRequest]:
    """What is read by a run that goes on from the checkpoint `tag` (None: begins) and goes through all of the stages as
    planned. new_stage: the first of them, which begins there.

    Raises CheckpointError as `where_to_start` and `begin_stage`.
    """
    start, step = where_to_start(tag, stages, names, new_stage), 0 if tag is None else files.tag_step(tag)
    index, manifest = start.index, start.manifest
    training: dict[str, Any] | None = None
    if start.ended and tag is not None:
        training = read_state(tag).config["training"]
    while True:
        if training is not None:
            index += 1
            manifest = begin_stage(manifest, StageEnd(step, training, None, []), stages[index], names)
        for arguments in needed_arguments(stages[index].run, manifest, step).values():
            yield IndexRequest(stages[index], arguments)
        if index + 1 == len(stages):
            return
        step, training = manifest.total_steps, stages[index].run.config.training.model_dump(mode="json")
