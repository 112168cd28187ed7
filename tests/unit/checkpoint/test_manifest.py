"""A checkpoint directory is complete when its manifest is there and fits every file."""

import random
from dataclasses import asdict

import numpy as np
import pytest
import torch

from mythos_ds.checkpoint import manifest, random_state
from mythos_ds.errors import CheckpointError
from mythos_ds.io import write_json


def make_tag(directory, step, content=b"weights" * 1000):
    tag = directory / manifest.tag_name(step)
    (tag / "part").mkdir(parents=True)
    (tag / "a.pt").write_bytes(content)
    (tag / "part" / "b.pt").write_bytes(b"")
    records = {str(path.relative_to(tag)): asdict(manifest.digest(path)) for path in manifest.data_files(tag)}
    write_json(tag / manifest.MANIFEST, {"format": 1, "files": records})
    return tag


def test_a_whole_checkpoint_verifies_on_every_rank(tmp_path):
    tag = make_tag(tmp_path, 5)
    assert set(manifest.read_manifest(tag)) == {"a.pt", "part/b.pt"}
    for rank in range(3):
        manifest.verify(tag, rank, 3)


def test_a_short_file_is_found_by_all_ranks(tmp_path):
    tag = make_tag(tmp_path, 5)
    (tag / "a.pt").write_bytes(b"weights")
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"a\.pt: 7 bytes, the manifest says 7000"):
            manifest.verify(tag, rank, 2)


def test_a_flipped_byte_is_found_by_the_rank_that_reads_the_file(tmp_path):
    tag = make_tag(tmp_path, 5)
    (tag / "a.pt").write_bytes(b"Weights" + b"weights" * 999)
    with pytest.raises(CheckpointError, match="checksum"):
        manifest.verify(tag, 0, 2)
    manifest.verify(tag, 1, 2)


@pytest.mark.parametrize("text", ["", "{", '{"files": 3}', '{"files": {"a.pt": {}}}'])
def test_a_torn_manifest_is_a_user_error(tmp_path, text):
    tag = make_tag(tmp_path, 5)
    (tag / manifest.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="manifest"):
        manifest.verify(tag, 0, 1)


def test_a_missing_file_or_manifest_is_found(tmp_path):
    tag = make_tag(tmp_path, 5)
    (tag / "a.pt").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        manifest.verify(tag, 0, 1)
    (tag / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not readable"):
        manifest.verify(tag, 0, 1)


def test_tags_are_newest_first_and_nothing_else_counts(tmp_path):
    for step in (5, 100000000, 20):
        make_tag(tmp_path, step)
    (tmp_path / f"{manifest.PARTIAL_PREFIX}step_00000030").mkdir()
    (tmp_path / "step_old").mkdir()
    (tmp_path / manifest.LATEST).write_text("step_00000020")
    assert [manifest.tag_step(tag) for tag in manifest.list_tags(tmp_path)] == [100000000, 20, 5]
    assert manifest.list_tags(tmp_path / "missing") == []


def test_prune_keeps_the_newest_and_clears_interrupted_saves(tmp_path):
    for step in (1, 2, 3):
        make_tag(tmp_path, step)
    (tmp_path / f"{manifest.PARTIAL_PREFIX}step_00000004").mkdir()
    manifest.prune(tmp_path, keep=2, newest=10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_prune_keeps_what_was_saved_behind_a_damaged_tag(tmp_path):
    for step in (7, 8):
        make_tag(tmp_path, step)
    manifest.prune(tmp_path, keep=1, newest=7)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_latest_names_the_newest(tmp_path):
    for step in (1, 2):
        manifest.point_latest(tmp_path, make_tag(tmp_path, step))
    assert (tmp_path / manifest.LATEST).read_text() == "step_00000002"


def test_shares_cover_everything_once(tmp_path):
    items = [tmp_path / str(index) for index in range(7)]
    shares = [item for rank in range(3) for item in manifest.share_of(items, rank, 3)]
    assert sorted(shares) == items


def test_random_states_come_back(tmp_path):
    device = torch.device("cpu")
    write_json(tmp_path / "state.json", random_state.capture(device))

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()  # noqa: NPY002

    expected = draw()
    draw()
    random_state.restore(tmp_path / "state.json", device)
    assert draw() == expected
