"""Portable checkpoints: a training state that does not depend on a layout, in safetensors and JSON.

`step_<n>/` with one set of files for each kind of tensors (weights, exp_avg, ...), the training state and a manifest.
Every layout loads it, as it loads the checkpoints of other layouts (`reshard`).
"""

from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any, Protocol

from torch import Tensor

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.deepspeed_format import WEIGHTS, open_checkpoint
from mythos_ds.errors import CheckpointError
from mythos_ds.io import read_json, sync, write_json
from mythos_ds.weights.reader import TensorFolder, TensorSource, elements
from mythos_ds.weights.writer import MAX_FILE_BYTES, write_tensors

PORTABLE = "portable"
"""Key of a layout: the kinds of tensors, where the checkpoint is portable."""
_STEPS = "optimizer_steps"


class StateTensors(TensorSource, Protocol):
    """One kind of a training state's tensors."""

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""


class PortableTensors(TensorFolder):
    """One kind of tensors of a portable checkpoint."""

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""
        return elements(self, name, start, stop)


def read_layout(tag: Path) -> dict[str, Any]:
    """The layout that wrote `tag`. Raises CheckpointError where it does not say."""
    layout = read_json(tag / manifest.STATE).get("layout")
    if not isinstance(layout, dict):
        raise CheckpointError(f"{tag / manifest.STATE}: names no layout")
    return {"pp_size": 1, **layout}


def open_state(tag: Path) -> tuple[dict[str, StateTensors], float]:
    """Kind -> its tensors, of a portable checkpoint or of any layout's, and the optimizer's step count."""
    layout = read_layout(tag)
    if PORTABLE in layout:
        return {kind: PortableTensors(tag, kind) for kind in layout[PORTABLE]}, float(layout[_STEPS])
    stages = layout["pp_size"] if isinstance(layout["pp_size"], int) else len(layout["pp_size"])
    tensors, steps = open_checkpoint(tag, layout["ep_size"], stages)
    return dict(tensors), steps


def write_portable(
    tag: Path,
    directory: Path,
    *,
    jobs: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the verified checkpoint `tag` as a portable one of the same name below `directory`, and name it `latest`.

    Goes on after an interruption. Raises CheckpointError where a checkpoint of that name is there already.
    """
    target, partial = directory / tag.name, directory / f"{manifest.PARTIAL_PREFIX}{tag.name}"
    if target.exists():
        raise CheckpointError(f"{target}: exists; choose another output, or remove it")
    sources, steps = open_state(tag)
    partial.mkdir(parents=True, exist_ok=True)
    for kind, source in sources.items():
        write_tensors(source, partial, stem=kind, jobs=jobs, max_file_bytes=max_file_bytes, progress=progress)
    for path in tag.glob("random_state_rank_*.json"):
        copyfile(path, partial / path.name)
    state = read_json(tag / manifest.STATE)
    kinds = [WEIGHTS, *sorted(set(sources) - {WEIGHTS})]
    write_json(partial / manifest.STATE, {**state, "layout": {PORTABLE: kinds, _STEPS: steps}})
    records = {str(path.relative_to(partial)): manifest.digest(path) for path in manifest.data_files(partial)}
    content = {name: {"size": record.size, "crc32": record.crc32} for name, record in records.items()}
    write_json(partial / manifest.MANIFEST, {"format": 1, "files": content})
    sync(partial)
    partial.rename(target)
    manifest.point_latest(directory, target)
    return target
