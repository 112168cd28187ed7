"""Preflight looks at what every training stage will read and write, not only the first."""

import json
import shutil

from mythos_ds.cluster.preflight.host_facts import Markers, _disk_space, config_hash, folders, gather
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve_stages
from mythos_ds.costs.params import checkpoint_disk_bytes
from tests.helpers.stages import changed, three_stages


def stages_of(path):
    return resolve_stages(load_config(str(path)).stages, 1)


def test_a_missing_file_of_the_second_stage_is_named_once(tmp_path):
    path = three_stages(tmp_path)
    stages = stages_of(path)
    assert gather(stages, tmp_path / "run", None, write=False)["data"] == []
    (tmp_path / "second.bin").unlink()
    found = gather(stages, tmp_path / "run", None, write=False)["data"]
    assert len(found) == 1
    assert found[0].startswith("stage long: ")
    assert "second" in found[0]


def test_validation_and_tokenizer_of_a_later_stage_are_looked_at(tmp_path):
    def other(content):
        content["stages"][2]["data"] |= {"validation": str(tmp_path / "held_out"), "split": [100, 0, 0],
                                         "tokenizer": str(tmp_path / "other.model")}  # fmt: skip

    path = three_stages(tmp_path)
    for tokenizer in tmp_path.glob("*.model"):
        shutil.copy(tokenizer, tmp_path / "other.model")
    stages = stages_of(changed(path, "other", other))
    (tmp_path / "other.model").unlink()
    found = gather(stages, tmp_path / "run", None, write=False)["data"]
    assert [problem.partition(": ")[0] for problem in found] == ["stage anneal", "stage anneal"], found
    assert any("held_out" in problem for problem in found)
    assert any("other.model" in problem for problem in found)


def test_the_stage_that_keeps_most_says_how_much_room_is_needed(tmp_path):
    path = three_stages(tmp_path)
    before = _disk_space([{"host": "a", "free_bytes": 10**12}], stages_of(path)).detail
    assert "9 + 1 checkpoints" in before
    more = changed(path, "more", lambda content: content["stages"][1].update(checkpoint={"keep": 20}))
    assert "20 + 1 checkpoints" in _disk_space([{"host": "a", "free_bytes": 10**12}], stages_of(more)).detail
    assert config_hash(stages_of(path)) != config_hash(stages_of(more))


def test_the_stage_with_the_largest_checkpoints_says_how_much_room_is_needed(tmp_path):
    def half(content):
        content["parallel"]["zero_stage"] = 1
        content["training"]["dtype"] = "bfloat16"

    path = changed(three_stages(tmp_path), "half", half)
    whole = changed(path, "whole", lambda content: content["stages"][1]["training"].update(dtype="float32"))
    need = max(checkpoint_disk_bytes(stage.run.config) for stage in stages_of(whole)) * (9 + 1)
    assert checkpoint_disk_bytes(stages_of(path)[0].run.config) * (9 + 1) < need
    room = [{"host": "a", "free_bytes": need - 1}]
    assert _disk_space(room, stages_of(path)).ok
    assert not _disk_space(room, stages_of(whole)).ok


def test_every_index_cache_is_shared_storage(tmp_path):
    cache = tmp_path / "elsewhere"
    path = three_stages(tmp_path)
    other = changed(path, "other", lambda content: content["stages"][1]["data"].update(data_dir=str(cache)))
    stages = stages_of(other)
    run_dir = tmp_path / "run"
    listed = [("run directory", run_dir), ("index cache", tmp_path), ("index cache", cache)]
    assert folders(run_dir, stages) == listed
    with Markers(run_dir, stages, "token") as markers:
        assert markers.problems == []
        assert gather(stages, run_dir, "token", write=False)["shared"] == []
        (marker,) = cache.iterdir()
    assert not marker.exists()
    assert not cache.exists()
    json.dumps(gather(stages, run_dir, None, write=False))
