"""Weights of a run that is still training: rank 0 takes a checkpoint for all."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch

from mythos_ds.checkpoint import manifest as files
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.train.run import _newest, _starting_weights
from mythos_ds.weights.reader import StartingWeights


def checkpoint(folder, step):
    tag = folder / files.tag_name(step)
    tag.mkdir(parents=True)
    (tag / "weights.pt").write_bytes(b"%d" % step)
    records = {path.name: asdict(files.digest(path)) for path in files.data_files(tag)}
    (tag / files.MANIFEST).write_text(json.dumps({"files": records}))
    return tag


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    tags = [checkpoint(folder, step) for step in (3, 6, 9)]
    (tags[2] / "weights.pt").write_bytes(b"damaged")
    assert _newest(tmp_path / "run") == _newest(folder) == str(tags[1])
    for other in (tags[0], tmp_path / "nothing"):
        assert _newest(other) == str(other)
    shutil.rmtree(tags[1])
    shutil.rmtree(tags[0])
    assert _newest(tmp_path / "run") == str(tmp_path / "run")  # what opens it says what is damaged
    (tmp_path / "run" / "config.json").write_text("{}")
    checkpoint(folder, 12)
    assert _newest(tmp_path / "run") == str(tmp_path / "run")  # a model folder


def test_all_ranks_open_what_rank_0_took(tmp_path):
    """The source saves on while ranks look: the second one sees another newest checkpoint."""
    run = tmp_path / "source"
    first = checkpoint(run / "checkpoints", 3)
    resolved = resolve(load_config("tiny").config, 1)
    training = resolved.config.training.model_copy(update={"init_from": str(run)})
    config = resolved.config.model_copy(update={"training": training})
    told: list[str] = []
    opened: list[str] = []

    def groups(rank) -> Any:
        def from_rank_zero(value):
            told.extend([value] if rank == 0 else [])
            return told[0]

        return SimpleNamespace(
            rank=rank,
            world_size=2,
            device=torch.device("cpu"),
            agree=lambda *_, **__: [2.0],
            from_rank_zero=from_rank_zero,
        )

    def open_weights(resolved, rank):
        opened.append(resolved.config.training.init_from)
        return StartingWeights(None, {"name": "step", "kind": "checkpoint", "sha256": "0"})  # type: ignore[arg-type]

    asked = replace(resolved, config=config)
    found = []
    for rank in (0, 1):
        found.append(_starting_weights(asked, groups(rank), open_weights))
        checkpoint(run / "checkpoints", 6 + rank)
    assert opened == [str(first)] * 2
    assert [weights.identity["name"] for weights in found if weights] == ["source"] * 2
