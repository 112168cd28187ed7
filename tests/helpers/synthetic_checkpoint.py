"""A training checkpoint with made-up values, of any size, in the form that DeepSpeed writes; no engine is needed."""

import json
import zlib
from collections import OrderedDict
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.save import TrainingState, layout_of
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.conversion.planned_checkpoint import rank_files
from mythos_ds.model.mythos import MythosModel


def write_synthetic(resolved: ResolvedRun, directory: Path, *, moments: bool = False) -> Path:
    """A ZeRO-3 checkpoint, a file at a time; of weights only, unless Adam's `moments` are asked for."""
    tag = directory / manifest.tag_name(1)
    with torch.device("meta"):
        shapes_of_buffers = {name: b.shape for name, b in MythosModel(resolved.config.model).named_buffers()}
    buffers = {name: torch.zeros(shape) for name, shape in shapes_of_buffers.items()}
    for index, stage in enumerate(resolved.stages):
        for rank_file in rank_files(resolved, index, stage):
            path = tag / rank_file.file
            path.parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(zlib.crc32(rank_file.file.encode()))
            flats, places = [], []
            for group in rank_file.groups:
                numel = sum(-(-prod(shape) // group.ranks) for shape in group.shapes.values())
                flats.append(torch.randn(numel, generator=generator))
                places.append({"partition_rank": group.rank, "partition_count": group.ranks})
            state = {"fp32_flat_groups": flats, "ds_zero_partition_groups": places}
            adam = {n: {"exp_avg": flat * 0.1, "exp_avg_sq": flat**2, "step": 1.0} for n, flat in enumerate(flats)}
            state["optimizer_state_dict"] = {"state": adam if moments else {}}
            torch.save({"optimizer_state_dict": state}, path)
            shapes = [OrderedDict(group.shapes) for group in rank_file.groups]
            model = {"module": buffers, "buffer_names": list(buffers), "param_shapes": shapes}
            torch.save(model, path.with_name(path.name.replace("optim_states", "model_states")))
    config = resolved.config.model_dump(mode="json")
    state_file = TrainingState(1, 8, None, layout_of(resolved), config)
    (tag / manifest.STATE).write_text(json.dumps(asdict(state_file)))
    records = {str(path.relative_to(tag)): asdict(manifest.digest(path)) for path in manifest.data_files(tag)}
    (tag / manifest.MANIFEST).write_text(json.dumps({"format": 1, "files": records}))
    return tag
