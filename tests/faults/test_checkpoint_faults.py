"""Checkpoints that were damaged, cannot be written, or hold what they should not: found, named, and gone around."""

import pytest
import torch

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.deepspeed_io import to_host
from tests.faults.checkpoint_fault_cases import DAMAGES
from tests.helpers.distributed import run_distributed

CASES = "tests.faults.checkpoint_fault_cases"
TIMEOUT_S = 200.0


def test_damage_is_named_once_and_the_good_checkpoint_before_it_used(tmp_path):
    by_rank = run_distributed(f"{CASES}:damaged", 2, TIMEOUT_S, folder=str(tmp_path))
    for damage in DAMAGES:
        name = damage.__name__
        first, second = (found["results"][name] for found in by_rank)
        said = first["said"] + second["said"]
        of_latest = first["file"] == manifest.LATEST
        assert len(said) == 1, (name, said)
        assert first["file"] in said[0], name
        assert said[0].startswith("skipping checkpoint step_00000002") != of_latest
        assert first["found"] == second["found"] == manifest.tag_name(2 if of_latest else 1), name
    went_on, resumed = by_rank[0]["losses"]
    assert went_on == resumed


def test_a_payload_in_a_shard_is_refused_and_not_executed(tmp_path):
    by_rank = run_distributed(f"{CASES}:payload", 2, TIMEOUT_S, folder=str(tmp_path))
    for layout in ("same", "other"):
        found = [results[layout] for results in by_rank]
        (told,) = (each["error"] for each in found if each["error"].startswith("RankError"))
        assert "_optim_states.pt: holds" in told
        assert "--allow-pickle" in told
        assert all(each["verifies"] for each in found)
        assert all(each["executed"] == [False, True] for each in found), "only where it was asked for"


def test_a_bad_disk_of_one_rank_ends_all_and_keeps_the_former_checkpoint(tmp_path):
    by_rank = run_distributed(f"{CASES}:bad_disks", 2, TIMEOUT_S, folder=str(tmp_path))
    for name in by_rank[0]:
        found = [results[name] for results in by_rank]
        errors = [each["error"] for each in found]
        assert all(errors), "every rank must learn of it"
        (told,) = (error for error in errors if error.startswith("RankError"))
        step = "checkpoint step_00000002 could not be "
        if name.startswith("_small_files"):
            assert f"{step}written: [Errno 27] File too large" in told, name
        else:
            assert f"{step}read back: " in told, name
            assert "checksum differs" in told
        assert f"_rank_{name[-1]}_mp" in told, "the file is named"
        for each in found:
            assert each["left"] == [manifest.LATEST, manifest.tag_name(1)]
            assert each["after"] == [3, 1]


@pytest.mark.parametrize(
    ("nprocs", "case"),
    [
        (2, {"ep": 2, "stage": 2}),
        (1, {"ep": 1, "stage": 0, "model": {"tie_embeddings": True}}),
    ],
)
def test_what_is_written_late_is_of_its_step(nprocs, case, tmp_path):
    found = run_distributed(f"{CASES}:beside_training", nprocs, TIMEOUT_S, folder=str(tmp_path), case=case)[0]
    assert found["different"] == []
    assert found["losses"][0] == found["losses"][1]
    assert found["early"] == [{}, {}], "nothing ended while the files were held back"
    assert found["unpublished"]
    assert found["times"] == ["checkpoint/seconds", "checkpoint/stall_seconds"]
    assert found["tags"] == [3, 1]


def test_a_snapshot_shares_nothing_with_what_it_was_taken_of():
    tensor = torch.arange(4.0)
    original = {"a": tensor, "b": [tensor[1:], {"c": (tensor, 3)}], "size": tensor.shape}
    copied = to_host(original, {})
    tensor.zero_()
    assert copied["a"].tolist() == [0, 1, 2, 3]
    assert copied["b"][0].tolist() == [1, 2, 3]
    assert copied["b"][1]["c"][0] is copied["a"], "tied weights stay one tensor"
    assert isinstance(copied["size"], torch.Size)


def test_every_so_many_steps_stay_for_good(tmp_path):
    for step in range(1, 8):
        (tmp_path / manifest.tag_name(step)).mkdir()
    manifest.prune(tmp_path, 2, 7, keep_every=3)
    assert [manifest.tag_step(tag) for tag in manifest.list_tags(tmp_path)] == [7, 6, 3]
