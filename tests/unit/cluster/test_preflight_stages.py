"""Preflight looks at what every training stage will read and write, not only the first."""

import json
import shutil

import pytest

from mythos_ds.cluster.preflight import host_facts
from mythos_ds.cluster.preflight.devices import outside_verdict
from mythos_ds.cluster.preflight.host_facts import Markers, _compiler, _disk_space, config_hash, folders, gather
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


@pytest.fixture
def gpu_host(monkeypatch, tmp_path):
    """A host with an NVIDIA driver and no CUDA toolkit; the folder of the latter."""
    (tmp_path / "driver").touch()
    monkeypatch.setattr(host_facts, "NVIDIA_DRIVER", tmp_path / "driver")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


def test_offloading_from_gpus_asks_for_a_compiler(gpu_host, tmp_path):
    def offloads(content):
        content["parallel"] |= {"offload_optimizer": "cpu", "zero_stage": 1}

    path = three_stages(tmp_path)
    assert "compiler" not in gather(stages_of(path), tmp_path / "run", None, write=False)
    stages = stages_of(changed(path, "offloads", offloads))
    (problem,) = gather(stages, tmp_path / "run", None, write=False)["compiler"]
    assert str(gpu_host / "bin" / "nvcc") in problem
    assert "CUDA_HOME" in problem
    (check,) = _compiler([{"host": "node7", "compiler": [problem]}, {"host": "node8", "compiler": []}])
    assert (check.ok, check.detail) == (False, f"node7: {problem}")
    (gpu_host / "bin").mkdir(parents=True)
    (gpu_host / "bin" / "nvcc").touch(mode=0o755)
    facts = gather(stages, tmp_path / "run", None, write=False)
    assert facts["compiler"] == []
    assert [check.ok for check in _compiler([facts])] == [True]


def test_memory_outside_the_allocator_is_set_beside_the_plan():
    names = ["rank 0 (a)", "rank 1 (b)"]
    found = [{"outside_bytes": 2_000_000_000}, {"outside_bytes": 3_000_000_000}]
    fine, more = (outside_verdict(found, names, planned) for planned in (2.8e9, 2.0e9))
    assert (fine.ok, fine.value) == (True, 3e9)
    assert "rank 1 (b)" in fine.detail
    assert more.ok is None
    assert "cluster.context_bytes=3000000000" in more.detail
    assert outside_verdict([{}, {}], names, 2e9).detail == "no GPU here"
