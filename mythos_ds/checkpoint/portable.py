"""Portable checkpoints: a training state that does not depend on a layout, in safetensors and JSON.

`step_<n>/` with one set of files for each kind of tensors (weights, exp_avg, ...), the training state and a manifest.
Every layout loads it, as it loads the checkpoints of other layouts (`reshard`).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.deepspeed_format import WEIGHTS, open_checkpoint
from mythos_ds.checkpoint.training_state import PORTABLE, STEPS, layout_of_state, read_layout, read_state
from mythos_ds.errors import CheckpointError, DamagedCheckpointError, naming
from mythos_ds.io import copy_file, read_json, real_folder, remove_leftovers, sync, write_json
from mythos_ds.weights.model_folder import checked_config
from mythos_ds.weights.reader import TensorFolder, TensorSource, elements
from mythos_ds.weights.whole_model import check_whole
from mythos_ds.weights.writer import MAX_FILE_BYTES, write_tensors

_JOB = ".job.json"
"""In a folder under construction: what it is to hold."""


class StateTensors(TensorSource, Protocol):
    """One kind of a training state's tensors."""

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""


class PortableTensors(TensorFolder):
    """One kind of tensors of a portable checkpoint."""

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""
        return elements(self, name, start, stop)


def open_state(tag: Path) -> tuple[dict[str, StateTensors], float]:
    """Kind -> its tensors, of a portable checkpoint or of any layout's, and the optimizer's step count."""
    layout = layout_of_state(read_state(tag), tag / manifest.STATE)
    if layout.portable is not None:
        if WEIGHTS not in layout.portable:
            raise DamagedCheckpointError(f"{tag / manifest.STATE}: layout.{PORTABLE}: names no {WEIGHTS}")
        return {kind: PortableTensors(tag, kind) for kind in layout.portable}, layout.optimizer_steps
    tensors, steps = open_checkpoint(tag, layout.ep_size, layout.stages)
    return dict(tensors), steps


def open_whole_state(tag: Path) -> tuple[dict[str, StateTensors], float]:
    """`open_state` of a checkpoint that is to be written anew. Raises CheckpointError unless its weights are all of its
    model's, and its other tensors are of these."""
    sources, steps = open_state(tag)
    path = tag / manifest.STATE
    config = checked_config(read_state(tag).config["model"], f"{path}: config.model")
    weights = sources[WEIGHTS].specs()
    with naming(tag):
        check_whole(weights, config)
    for kind, source in sources.items():
        for name, spec in source.specs().items():
            if name not in weights or spec.shape != weights[name].shape:
                raise DamagedCheckpointError(f"{tag}: {kind} of {name} has the shape {spec.shape}, unlike the weight")
    return sources, steps


def write_portable(
    tag: Path,
    directory: Path,
    *,
    jobs: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the verified checkpoint `tag` as a portable one of the same name below `directory`, and name it `latest`.

    Goes on after an interruption. No other job may write there meanwhile (`output_lock`). Raises CheckpointError where
    a checkpoint of that name is there already, but for one of this kind that a job left before it named it `latest`.
    """
    target, partial = directory / tag.name, directory / f"{manifest.PARTIAL_PREFIX}{tag.name}"
    sources, steps = open_whole_state(tag)
    if unfinished(directory, tag):
        manifest.verify(target, 0, 1)
        return _named_latest(target)
    if target.exists():
        raise CheckpointError(f"{target}: exists; choose another output, or remove it", code="MDS601")
    _begin(partial, tag, max_file_bytes)
    for kind, source in sources.items():
        write_tensors(source, partial, stem=kind, jobs=jobs, max_file_bytes=max_file_bytes, progress=progress)
    for path in tag.glob("random_state_rank_*.json"):
        copy_file(path, partial / path.name)
    state = read_json(tag / manifest.STATE, dict[str, Any])
    kinds = [WEIGHTS, *sorted(set(sources) - {WEIGHTS})]
    write_json(partial / manifest.STATE, {**state, "layout": {PORTABLE: kinds, STEPS: steps}})
    remove_leftovers(partial, alone=True)
    (partial / _JOB).unlink()
    records = {str(path.relative_to(partial)): manifest.digest(path) for path in manifest.data_files(partial)}
    content = {name: {"size": record.size, "crc32": record.crc32} for name, record in records.items()}
    write_json(partial / manifest.MANIFEST, {"format": 1, "files": content})
    sync(partial)
    partial.rename(target)
    return _named_latest(target)


def _begin(partial: Path, tag: Path, max_file_bytes: int) -> None:
    """Make the hidden folder ready: what a killed job for the same files left there is gone on with, all else goes."""
    job = {"manifest": manifest.digest(tag / manifest.MANIFEST).crc32, "max_file_bytes": max_file_bytes}
    real_folder(partial)
    mark = partial / _JOB
    if not mark.is_file() or read_json(mark) != job:
        shutil.rmtree(partial)
        partial.mkdir()
        write_json(mark, job)


def unfinished(directory: Path, tag: Path) -> bool:
    """Whether `directory` is as `write_portable` of `tag` leaves it when it is ended just before its last step."""
    target = directory / tag.name
    alone = manifest.list_tags(directory) == [target]
    if not alone or manifest.read_latest(directory) == tag.name or PORTABLE not in read_layout(target):
        return False
    return read_state(target).config == read_state(tag).config


def _named_latest(target: Path) -> Path:
    manifest.point_latest(target.parent, target)
    remove_leftovers(target.parent, alone=True)
    return target
