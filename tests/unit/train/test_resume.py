"""A checkpoint that was copied alone goes on, or the message says what is missing."""

import errno
import json
import math
import os
import random
import shutil
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.errors import CheckpointError, RankError
from mythos_ds.train import resume, run_changes
from mythos_ds.train.resume import _refuse_other, choose_checkpoint, names_of, where_to_start
from mythos_ds.train.run_changes import continue_manifest
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import RunManifest, new_manifest, with_weights

ALONE: Any = SimpleNamespace(
    rank=0,
    world_size=1,
    device=torch.device("cpu"),
    agree=lambda values, *_, **__: values,
    from_rank_zero=lambda value: value,
)
DATA = {"content": ["0f"], "tokenizer": "abc", "validation": {"content": ["1a"], "weights": [1.0]}}
WEIGHTS = {"name": "base", "kind": "model", "sha256": "77"}


NAMES = names_of(None, "tiny.json", [])


def planned(*overrides):
    return new_manifest(_resolved(*overrides))


def asked(*overrides):
    return ResolvedStage(None, _resolved(*overrides))


def with_dataset(manifest, identity):
    return run_changes.with_dataset(manifest, identity, _resolved().config, NAMES)


def manifest_for(tag, *overrides):
    return where_to_start(tag, [asked(*overrides)], names_of(tag, "tiny.json", overrides)).manifest


def _resolved(*overrides):
    return resolve(load_config("tiny", ["training.warmup_steps=2", *overrides]).config, 2)


def made_run(root, manifest, step, *, older=False):
    """A run directory with one checkpoint, of this version or of one that did not write the manifest into it."""
    run = RunDirectory(root)
    run.root.mkdir(parents=True, exist_ok=True)
    run.write_manifest(manifest)
    tag = run.checkpoints / files.tag_name(step)
    tag.mkdir(parents=True)
    config = _resolved(f"training.max_steps={manifest.total_steps}").config.model_dump(mode="json")
    state = asdict(
        TrainingState(step, step, 1.0, {"ep_size": 1}, config, manifest.starting_weights, manifest.as_dict())
    )
    if older:
        del state["run"]
    (tag / files.STATE).write_text(json.dumps(state))
    (tag / "weights.pt").write_bytes(b"tensors")
    records = {path.name: asdict(files.digest(path)) for path in files.data_files(tag)}
    (tag / files.MANIFEST).write_text(json.dumps({"files": records}))
    return run, tag


def grown(seed):
    """A manifest of a run that was made longer a few times, and a step in it."""
    pick = random.Random(seed)
    manifest = with_dataset(planned("training.max_steps=10"), DATA)
    if pick.random() < 0.5:
        manifest = with_weights(manifest, WEIGHTS)
    for _ in range(pick.randint(0, 3)):
        longer = asked(f"training.max_steps={manifest.total_steps + pick.randint(1, 9)}")
        manifest = continue_manifest(
            manifest, longer, pick.randint(manifest.phases[-1].start_step + 1, manifest.total_steps), NAMES
        )
    return manifest, pick.randint(manifest.phases[-1].start_step + 1, manifest.total_steps)


@pytest.mark.parametrize("seed", range(12))
def test_alone_it_says_what_its_run_said(tmp_path, seed):
    manifest, step = grown(seed)
    run, tag = made_run(tmp_path / "run", manifest, step)
    wanted = f"training.max_steps={manifest.total_steps + seed % 2 * 5}"
    expected = manifest_for(tag, wanted)
    copies = [tmp_path / "backup" / tag.name, tmp_path / "other" / "checkpoints" / tag.name, tmp_path / tag.name]
    for copy in copies:
        shutil.copytree(tag, copy)
        assert choose_checkpoint(ALONE, RunDirectory(tmp_path / "new"), str(copy)) == copy
        assert manifest_for(copy, wanted) == expected
    (tmp_path / "manifest.json").write_text("{}")  # of something else, two folders above a copy
    assert manifest_for(copies[0], wanted) == expected
    moved = shutil.copytree(run.root, tmp_path / "moved")
    assert choose_checkpoint(ALONE, RunDirectory(moved), "auto") == moved / "checkpoints" / tag.name
    (moved / "manifest.json").unlink()
    assert manifest_for(moved / "checkpoints" / tag.name, wanted) == expected


@pytest.mark.parametrize("weights", [False, True])
def test_an_older_checkpoint_says_what_its_configuration_says(tmp_path, weights):
    whole = with_dataset(planned("training.max_steps=10"), DATA)
    whole = with_weights(whole, WEIGHTS) if weights else whole
    _, tag = made_run(tmp_path / "run", whole, 4, older=True)
    copy = shutil.copytree(tag, tmp_path / "backup" / tag.name)
    found = manifest_for(copy, "training.max_steps=10")
    assert found.phases == whole.phases
    assert found.pinned == {
        name: value for name, value in whole.pinned.items() if name not in ("dataset", "data_files")
    }
    with pytest.raises(CheckpointError, match="seq_len"):
        manifest_for(copy, "training.max_steps=10", "training.seq_len=8")
    with pytest.raises(CheckpointError, match="training length"):
        manifest_for(copy, "training.max_steps=5")


def test_alone_it_refuses_other_data(tmp_path):
    manifest, step = grown(3)
    _, tag = made_run(tmp_path / "run", manifest, step)
    copy = shutil.copytree(tag, tmp_path / "backup" / tag.name)
    found = manifest_for(copy, f"training.max_steps={manifest.total_steps}")
    with pytest.raises(CheckpointError, match=r"data\.datasets"):
        with_dataset(found, {**DATA, "content": ["other"]})


@pytest.mark.parametrize("name", [files.STATE, "weights.pt", files.MANIFEST])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "folder"])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, name, how):
    _, tag = made_run(tmp_path / "run", grown(1)[0], 4)
    copy = shutil.copytree(tag, tmp_path / "backup" / tag.name)
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if how == "folder":
        (copy / name).mkdir()
    elif how != "missing":
        (copy / name).write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(RankError) as caught:
        choose_checkpoint(ALONE, RunDirectory(tmp_path / "new"), str(copy))
    assert str(copy / name) in str(caught.value)


def test_what_is_no_checkpoint_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, tag = made_run(tmp_path / "run", grown(1)[0], 4)
    shutil.copytree(tag, tmp_path / "best")
    (tmp_path / "empty").mkdir()
    new = RunDirectory(tmp_path / "new")
    for given, message in {
        "nowhere": f"given nowhere (looked for in {tmp_path}); no such folder",
        "nowhere/step_00000004": f"(looked for in {tmp_path}); no such folder",
        "best": "given best, a checkpoint under another name; rename it to step_00000004",
        "empty": "empty: no complete checkpoint",
    }.items():
        with pytest.raises(RankError) as caught:
            choose_checkpoint(ALONE, new, given)
        assert message in str(caught.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP])
def test_a_checkpoint_that_cannot_be_looked_at_is_not_said_to_be_missing(number, tmp_path, monkeypatch):
    def refused(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "lstat", refused)
    with pytest.raises(CheckpointError, match=rf"a; {os.strerror(number).lower()}"):
        _refuse_other(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"pinned": {}, "phases": []},
        {"pinned": {"model": {}, "seq_len": 8, "global_batch_size": 4}, "phases": []},
        {"pinned": {"model": {}, "seq_len": 8, "global_batch_size": 4}, "phases": [{"start_step": 0}]},
        {"pinned": {"model": {}, "seq_len": 8, "global_batch_size": 4}, "phases": [[0, 4, 1, 0]]},
        {
            "pinned": {"model": 3, "seq_len": 8, "global_batch_size": 4},
            "phases": [{"start_step": 0, "end_step": 4, "seed": 1}],
        },
        {"pinned": {"model": {}, "seq_len": 8}, "phases": [{"start_step": 0, "end_step": 4, "seed": 1}]},
        {
            "pinned": {"model": {}, "seq_len": 8, "global_batch_size": 4},
            "phases": [{"start_step": 3, "end_step": 4, "seed": 1}],
        },
        {
            "pinned": {"model": {}, "seq_len": 8, "global_batch_size": 4},
            "phases": [{"start_step": 0, "end_step": "4", "seed": 1}],
        },
        [],
        "text",
        None,
    ],
)
def test_a_manifest_of_another_shape_is_one_message(tmp_path, content):
    run = RunDirectory(tmp_path)
    run.manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        run.read_manifest()
    with pytest.raises(CheckpointError, match="state: run: "):
        RunManifest.of(content, "state: run")


def test_a_run_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=r"cannot be written .*; give another --run-dir"):
            RunDirectory(root).lock()


def test_a_longer_run_says_what_its_learning_rate_becomes(tmp_path, monkeypatch):
    settings = ["training.schedule=cosine", "training.warmup_steps=0", "training.lr=0.001", "training.min_lr_ratio=0.1"]
    tag = made_run(tmp_path / "run", planned("training.max_steps=40", *settings), 40)[1]
    said = []
    monkeypatch.setattr(resume._logger, "info", lambda text, *values: said.append(text % values))
    manifest_for(tag, "training.max_steps=40", *settings)
    assert said == []
    manifest_for(tag, "training.max_steps=60", *settings)
    new = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 41 / 60))
    assert said == [
        "planned length 40 -> 60 steps: the learning rate now follows the schedule of 60 steps; "
        f"at step 41: 0.0001 -> {0.001 * new:.3g}"
    ]
