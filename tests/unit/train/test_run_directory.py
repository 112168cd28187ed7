"""A run pins what it is; it may be continued and extended, not changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.errors import CheckpointError
from mythos_ds.io import write_atomic
from mythos_ds.provenance import package_versions
from mythos_ds.train import run_changes
from mythos_ds.train.lr_schedule import PlannedLength
from mythos_ds.train.run_changes import RunNames, continue_manifest
from mythos_ds.train.run_directory import RunDirectory, another_layout_note, default_run_directory
from mythos_ds.train.run_manifest import Phase, new_manifest

IDENTITY = {"content": ["0f"], "tokenizer": "abc"}


NAMES = RunNames("tiny.json", frozenset(), "runs/tiny", "runs/tiny/config.resolved.json")


def planned(*overrides):
    """What the configuration of a start asks for, before its data is opened."""
    config = load_config("tiny", ["training.warmup_steps=2", *overrides]).config
    return ResolvedStage(None, resolve(config, 2))


def with_dataset(manifest, identity):
    return run_changes.with_dataset(manifest, identity, planned().run.config, NAMES)


def manifest(*overrides):
    """A stored manifest."""
    return with_dataset(new_manifest(planned(*overrides).run), IDENTITY)


@pytest.mark.parametrize(
    ("config", "overrides", "processes", "name"),
    [
        ("tiny.json", [], None, "tiny"),
        ("tiny", ["parallel.zero_stage=1", "parallel.ep_size=2"], None, "tiny-ep2-zero1"),
        ("tiny", ["training.max_steps=5", "data.data_dir=x", "parallel.timeout_s=60"], None, "tiny"),
        ("tiny", ["parallel.zero_stage=3", "parallel.pp_size=1", "parallel.ep_size=auto"], None, "tiny"),
        ("1t", ["parallel.ep_size=256"], None, "1t"),
        ("1t", ["parallel.ep_size=64"], None, "1t-ep64"),
        ("1t", ["parallel.ep_size=null"], None, "1t-epauto"),
        ("10b", ["parallel.ep_size=2", "parallel.pp_size=[1,2,1]"], None, "10b-pp1-2-1-ep2"),
        ("1t", ["data.data_dir=data"], 2, "1t-proxy-x2"),
        ("1t", ["parallel.pp_size=2"], 4, "1t-proxy-x4-pp2"),
    ],
)
def test_a_proxy_and_another_layout_have_directories_of_their_own(config, overrides, processes, name):
    assert default_run_directory(load_config(config, overrides), processes) == Path("runs") / name


def test_the_layout_is_compared_with_the_file(tmp_path):
    """Written into the file it is the file's own."""
    content = json.loads(load_config("tiny").text)
    content["parallel"]["zero_stage"] = 1
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    names = [str(default_run_directory(load_config(str(path), [f"parallel.zero_stage={n}"]))) for n in (1, 3)]
    assert names == ["runs/mine", "runs/mine-zero3"]
    del content["parallel"]
    path.write_text(json.dumps(content))
    assert default_run_directory(load_config(str(path), ["parallel.ep_size=2"])) == Path("runs/mine-ep2")


def test_a_fresh_start_in_another_layout_says_where_the_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_config("tiny", ["parallel.ep_size=2"])
    other = default_run_directory(loaded)
    assert another_layout_note(loaded, other) is None
    RunDirectory(Path("runs/tiny")).root.mkdir(parents=True)
    Path("runs/tiny/manifest.json").write_text("{}")
    note = another_layout_note(loaded, other)
    assert note is not None
    assert note.startswith("runs/tiny-ep2: another layout")
    assert note.endswith("--resume runs/tiny")
    assert another_layout_note(loaded, Path("runs/tiny")) is None
    other.mkdir()
    assert another_layout_note(loaded, other) is None, "it goes on with its own run"


def test_manifest_survives_the_file(tmp_path):
    run = RunDirectory(tmp_path / "run")
    written = continue_manifest(manifest("training.max_steps=20"), planned("training.max_steps=30"), 12, NAMES)
    run.write_manifest(written)
    assert run.read_manifest() == written
    content = json.loads(run.manifest.read_text())
    assert (content["total_steps"], content["tokens"]) == (30, 30 * 8 * 256)


def test_same_length_keeps_the_phases():
    first = manifest("training.max_steps=20")
    assert continue_manifest(first, planned("training.max_steps=20"), 7, NAMES) == first


def test_a_longer_run_appends_a_phase_with_its_own_seed():
    first = manifest("training.max_steps=20", "training.seed=5")
    longer = continue_manifest(first, planned("training.max_steps=50", "training.seed=5"), 20, NAMES)
    longest = continue_manifest(longer, planned("training.max_steps=60", "training.seed=5"), 33, NAMES)
    assert longest.phases == (Phase(0, 20, 5), Phase(20, 50, 6, decided_at=20), Phase(50, 60, 7, decided_at=33))
    assert [longest.phase_index(step) for step in (0, 19, 20, 49, 50, 59, 60)] == [0, 0, 1, 1, 2, 2, 2]
    assert longest.lengths == [PlannedLength(0, 20), PlannedLength(20, 50), PlannedLength(33, 60)]


def test_an_extension_that_never_began_is_undone():
    first = manifest("training.max_steps=20")
    longer = continue_manifest(first, planned("training.max_steps=100000"), 20, NAMES)
    assert continue_manifest(longer, planned("training.max_steps=20"), 20, NAMES) == first


def test_one_run_holds_a_directory(tmp_path):
    run = RunDirectory(tmp_path / "run")
    handle = run.lock()
    with pytest.raises(CheckpointError, match="another run is using it"):
        RunDirectory(tmp_path / "run").lock()
    handle.close()
    run.lock().close()


def test_a_shorter_run_is_refused():
    with pytest.raises(CheckpointError, match="10 steps now, 20 when the run was started"):
        continue_manifest(manifest("training.max_steps=20"), planned("training.max_steps=10"), 5, NAMES)


def test_every_difference_is_named_at_once():
    changed = planned("training.seq_len=128", "model.ffn_dim=256", "training.seed=9")
    with pytest.raises(CheckpointError) as caught:
        continue_manifest(manifest(), changed, 5, NAMES)
    message = str(caught.value)
    for line in (
        "training.seq_len: 128 in tiny.json now, 256 in runs/tiny/config.resolved.json when the run was started",
        "model.ffn_dim: 256 in tiny.json now, 384 in",
        "training.seed: 9 in tiny.json now, 0 in",
        "no training stage may change all of these",
    ):
        assert line in message


def test_a_key_that_was_added_since_means_its_default():
    """A run of an older version goes on, unless the new key is set to something else."""
    first = manifest()
    model = dict(first.pinned["model"])
    for key in ("no_rope_layers", "attention_biases", "norm_placement", "qk_norm_span", "rope_scaling"):
        del model[key]
    old = replace(first, pinned={**first.pinned, "model": model})
    assert continue_manifest(old, planned(), 5, NAMES).pinned == old.pinned
    with pytest.raises(CheckpointError, match=r'model\.norm_placement: "after" in tiny.json now, "before" in'):
        continue_manifest(old, planned("model.norm_placement=after"), 5, NAMES)


def test_another_dataset_is_refused():
    assert with_dataset(manifest(), IDENTITY) == manifest()
    with pytest.raises(CheckpointError, match=r'data\.tokenizer: "other" now, "abc" when the run was started'):
        with_dataset(manifest(), {**IDENTITY, "tokenizer": "other"})


def test_settings_that_do_not_change_what_is_learnt_are_free():
    changed = planned("training.lr=0.001", "monitor.log_interval=1", "training.micro_batch_size=2")
    assert continue_manifest(manifest(), changed, 5, NAMES) == manifest()


def test_damaged_manifest_is_a_user_error(tmp_path):
    run = RunDirectory(tmp_path)
    run.manifest.write_text('{"phases": [')
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        run.read_manifest()


def test_start_records_config_versions_and_source(tmp_path):
    run, loaded = RunDirectory(tmp_path / "run"), load_config("tiny")
    run.record_configuration([ResolvedStage(None, resolve(loaded.config, 2))], loaded.text)
    run.record_start(0, 2, ["--config", "tiny"])
    run.record_start(7, 2, ["--config", "tiny"])
    resolved = json.loads((run.root / "config.resolved.json").read_text())
    assert resolved["model"]["dim"] == 128
    assert resolved["_derived"]["ep_size"] == 2
    assert (run.root / "config.source.json").read_text() == loaded.text
    starts = [json.loads(line) for line in (run.root / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 7]
    assert starts[0]["versions"] == package_versions()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "a")
    write_atomic(path, "b")
    assert path.read_text() == "b"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_start_leaves_no_directory_that_it_has_made(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "new")
    handle = run.lock()
    run.remove_unused()
    handle.close()
    assert list(tmp_path.iterdir()) == []
    for kept in ("before", "written"):
        run = RunDirectory(tmp_path / kept)
        if kept == "before":
            run.root.mkdir()
        handle = run.lock()
        if kept == "written":
            run.metrics.touch()
        run.remove_unused()
        handle.close()
        assert run.root.is_dir()
