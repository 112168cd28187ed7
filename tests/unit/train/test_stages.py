"""What the manifest of a run of several training stages says, and where a start in it begins."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.training_state import TrainingState
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve, resolve_stages
from mythos_ds.data.datasets import data_identity
from mythos_ds.errors import CheckpointError
from mythos_ds.train import run_changes
from mythos_ds.train.metrics_logger import validation_history
from mythos_ds.train.resume import names_of, where_to_start
from mythos_ds.train.run_changes import StageEnd, begin_stage, check_former
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import FormerStage, Phase, RunManifest, planned_stages, staged_manifest
from tests.helpers.mains import load_main
from tests.helpers.stages import three_stages

NAMES = names_of(None, "run.json", [])
SIZES = ["training.warmup_steps=2", "training.micro_batch_size=1"]


def stage(name: str | None, *overrides: str) -> ResolvedStage:
    return ResolvedStage(name, resolve(load_config("tiny", [*SIZES, *overrides]).config, 1))


BASE = stage("base", "training.max_steps=10", "training.lr=0.5")
RAMP = 'training.global_batch_ramp={"start": 2, "increment": 2, "samples": 8}'
LONG = stage("long", "training.max_steps=20", "training.seq_len=1024", "training.global_batch_size=4", RAMP)
ANNEAL = stage("anneal", "training.max_steps=5", "model.mean_recurrence=5")
STAGES = [BASE, LONG, ANNEAL]


def end(step: int, of: ResolvedStage) -> StageEnd:
    return StageEnd(step, of.run.config.training.model_dump(mode="json"), 6.0, [{"step": step, "losses": {"4": 5.0}}])


def grown() -> list[RunManifest]:
    """The manifests of a run that goes through three stages."""
    manifests = [staged_manifest(STAGES)]
    for number in (1, 2):
        before = manifests[-1]
        begun = begin_stage(before, end(before.total_steps, STAGES[number - 1]), STAGES[number], NAMES)
        manifests.append(replace(begun, stages_ahead=planned_stages(STAGES[number + 1 :])))
    return manifests


def test_steps_samples_tokens_and_seeds_go_on_over_stages():
    base, long, anneal = grown()
    assert [manifest.planned_steps for manifest in (base, long, anneal)] == [35] * 3
    assert base.planned_tokens == long.planned_tokens == anneal.planned_tokens
    assert [manifest.phases for manifest in (long, anneal)] == [
        (Phase(10, 30, 1, decided_at=10),),
        (Phase(30, 35, 2, decided_at=30),),
    ]
    # 10 steps of 8; then 4 of 2 before the batch is 4: 8 samples, and 16 steps of 4
    assert (long.samples_at(10), long.samples_at(14), anneal.samples_at(30)) == (80, 88, 80 + 8 + 64)
    assert anneal.tokens_at(30) == 80 * 256 + 72 * 1024
    assert long.lengths[0].total_steps == 20
    assert asdict(long.start) == {"step": 10, "sample": 80, "mean_recurrence": 4}
    assert long.start_lr == pytest.approx(0.5 * 0.02), "a cosine ends at its floor"


def test_a_manifest_of_stages_survives_the_file(tmp_path):
    for manifest in grown():
        run = RunDirectory(tmp_path)
        run.write_manifest(manifest)
        assert run.read_manifest() == manifest
        assert json.loads(run.manifest.read_text())["total_steps"] == 35
        assert RunManifest.of(manifest.as_dict(), "state: run") == manifest


def test_a_run_without_stages_is_written_as_before():
    assert set(staged_manifest([stage(None)]).as_dict()) == {"phases", "pinned"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda former: former.pop("pinned"),
        lambda former: former.update(pinned={}),
        lambda former: former["phases"][0].update(end_step=12),
        lambda former: former.update(phases=[]),
        lambda former: former.update(samples="many"),
    ],
)
def test_a_former_stage_of_another_shape_is_one_message(damage, tmp_path):
    content = json.loads(json.dumps(grown()[1].as_dict()))
    damage(content["former_stages"][0])
    with pytest.raises(CheckpointError, match="state: run: "):
        RunManifest.of(content, "state: run")


def test_back_at_a_step_it_is_what_it_was():
    base, long, anneal = grown()
    for step in (1, 9, 10):
        found = anneal.back_at(step)
        assert (found.stage, found.phases, found.former_stages) == ("base", base.phases, ())
    for step in (11, 30):
        assert replace(anneal.back_at(step), stages_ahead=long.stages_ahead) == long
    assert anneal.back_at(31) == anneal


def checkpoint(root: Path, manifest: RunManifest, step: int) -> Path:
    run = RunDirectory(root)
    run.root.mkdir(parents=True, exist_ok=True)
    run.write_manifest(manifest)
    tag = run.checkpoints / files.tag_name(step)
    tag.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = BASE.run.config.model_dump(mode="json")
    state = TrainingState(step, step, None, {"ep_size": 1}, config, None, manifest.as_dict())
    (tag / files.STATE).write_text(json.dumps(asdict(state)))
    return tag


@pytest.mark.parametrize(
    ("manifest", "step", "index", "ended"),
    [(0, 5, 0, False), (0, 10, 0, False), (1, 10, 0, True), (1, 20, 1, False), (2, 30, 1, True), (2, 35, 2, False)],
)
def test_where_a_start_begins(manifest, step, index, ended, tmp_path):
    """A boundary whose next stage was noted needs no second evaluation; one that was not is ended again."""
    tag = checkpoint(tmp_path, grown()[manifest], step)
    start = where_to_start(tag, STAGES, NAMES)
    assert (start.index, start.ended, start.manifest.stage) == (index, ended, STAGES[index].name)
    assert start.manifest.planned_steps == 35


def test_stages_can_be_appended_and_those_ahead_changed(tmp_path):
    tag = checkpoint(tmp_path, staged_manifest([BASE]), 10)
    start = where_to_start(tag, STAGES, NAMES)
    assert (start.index, start.manifest.planned_steps) == (0, 35)
    other = stage("long", "training.max_steps=7")
    assert where_to_start(checkpoint(tmp_path, grown()[0], 10), [BASE, other], NAMES).manifest.planned_steps == 17


def test_the_last_stage_can_be_longer(tmp_path):
    longer = stage("anneal", "training.max_steps=9", "model.mean_recurrence=5")
    start = where_to_start(checkpoint(tmp_path, grown()[2], 35), [BASE, LONG, longer], NAMES)
    assert start.manifest.phases[1:] == (Phase(35, 39, 3, decided_at=35),)
    shorter = stage("anneal", "training.max_steps=3", "model.mean_recurrence=5")
    with pytest.raises(CheckpointError, match="training length: 3 steps now, 5 when"):
        where_to_start(checkpoint(tmp_path, grown()[2], 33), [BASE, LONG, shorter], NAMES)


def test_a_new_stage_begins_where_another_run_ended(tmp_path):
    tag = checkpoint(tmp_path, staged_manifest([stage(None, "training.max_steps=10")]), 10)
    start = where_to_start(tag, [LONG], NAMES, "long")
    assert (start.index, start.ended, start.manifest.stage) == (-1, True, None)
    begun = checkpoint(tmp_path / "new", grown()[1], 20)
    assert where_to_start(begun, [LONG, ANNEAL], NAMES, "long").index == 0
    assert where_to_start(checkpoint(tmp_path / "new", grown()[2], 33), [LONG, ANNEAL], NAMES, "long").index == 1
    with pytest.raises(CheckpointError, match="--stage long: there is no checkpoint"):
        where_to_start(None, [LONG], NAMES, "long")


def test_an_unfinished_stage_is_cut_where_the_next_begins():
    begun = begin_stage(staged_manifest([BASE]), end(6, BASE), LONG, NAMES)
    (former,) = begun.former_stages
    assert (former.end_step, former.samples, begun.start_step) == (6, 48, 6)


def test_a_change_with_another_length_still_says_how_to_make_it_a_stage(tmp_path):
    tag = checkpoint(tmp_path, staged_manifest([stage(None, "training.max_steps=10")]), 10)
    with pytest.raises(CheckpointError) as caught:
        where_to_start(tag, [stage(None, "training.max_steps=3", "training.seq_len=512")], NAMES)
    message = str(caught.value)
    assert "training.seq_len: 512 in run.json now, 256 in" in message
    assert "training length: 3 steps now, 10 when the run was started" in message
    assert '"training": {"max_steps": 3, "seq_len": 512}}' in message


def test_what_a_stage_cannot_change():
    other = stage("wide", "training.max_steps=5", "model.ffn_dim=256", "training.seed=7", "training.optimizer=sgd",
                  "training.beta1=null", "training.beta2=null")  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        begin_stage(grown()[1], end(30, LONG), other, NAMES)
    message = str(caught.value)
    for key in ("model.ffn_dim: 256", "training.seed: 7", 'training.optimizer: "sgd"'):
        assert key in message
    assert "seq_len" not in message
    with pytest.raises(CheckpointError, match="has had a stage of that name"):
        begin_stage(grown()[1], end(30, LONG), stage("base", "training.max_steps=5"), NAMES)
    lora = ["model.lora_rank=2", "training.max_steps=5"]
    with pytest.raises(CheckpointError, match=r"model\.max_loops: 17 given; allowed: 16"):
        begin_stage(staged_manifest([stage("a", *lora)]), end(5, BASE), stage("b", *lora, "model.max_loops=17"), NAMES)


def test_conversations_are_told_by_the_settings_that_name_them():
    """What is to be pasted into a stage has settings of the file only."""
    chat: dict[str, Any] = {"packing": 1, "loss_mask": True, "chat_template": "x", "ends": [7]}
    text: dict[str, Any] = {"tokenizer": "t", "content": ["0f"], "weights": [1.0]}
    pinned = run_changes.with_dataset(staged_manifest([BASE]), text, BASE.run.config, NAMES)
    with pytest.raises(CheckpointError) as caught:
        run_changes.with_dataset(pinned, {**text, "content": ["1a"], "conversations": chat}, BASE.run.config, NAMES)
    assert "data.datasets: the built-in corpus (with another content) now" in str(caught.value)
    assert "conversations" not in str(caught.value)
    pinned = run_changes.with_dataset(staged_manifest([BASE]), {**text, "conversations": chat}, BASE.run.config, NAMES)
    every = {**text, "conversations": {**chat, "loss_mask": False}}
    with pytest.raises(CheckpointError, match=r"data\.loss_mask: false now, true when the run was started") as caught:
        run_changes.with_dataset(pinned, every, BASE.run.config, NAMES)
    assert '"data": {"loss_mask": null}' in str(caught.value)


def with_text(manifest: RunManifest, split: list[float], content: str = "0f", **more: Any) -> RunManifest:
    """The manifest of a stage that has opened this text."""
    identity = {"tokenizer": "t", "content": [content], "weights": [1.0], "split": split, **more}
    return run_changes.with_dataset(manifest, identity, BASE.run.config, NAMES)


@pytest.mark.parametrize(
    ("before", "now", "noted"),
    [
        ([90.0, 10.0, 0.0], {"split": [90.0, 10.0, 0.0]}, False),
        ([90.0, 10.0, 0.0], {"split": [9.0, 1.0, 0.0]}, False),
        ([90.0, 10.0, 0.0], {"split": [80.0, 10.0, 10.0]}, True),
        ([100.0, 0.0, 0.0], {"split": [90.0, 10.0, 0.0]}, True),
        ([100.0, 0.0, 0.0], {"split": [100.0, 0.0, 0.0]}, False),
        ([100.0, 0.0, 0.0], {"split": [90.0, 10.0, 0.0], "content": "1a"}, False),
        ([90.0, 10.0, 0.0], {"split": [1.0, 0.0, 0.0], "content": "1a", "validation": {"content": ["0f"]}}, True),
        ([90.0, 10.0, 0.0], {"split": [1.0, 0.0, 0.0], "content": "0f", "validation": {"content": ["2b"]}}, False),
    ],
)
def test_held_out_text_that_a_stage_before_has_read_is_told(before, now, noted):
    base = with_text(staged_manifest([BASE]), before)
    notes = run_changes.trained_on_before(with_text(begin_stage(base, end(10, BASE), LONG, NAMES), **now))
    assert len(notes) == noted
    assert all("held-out text of stage long was trained on in stage base" in note for note in notes)
    assert run_changes.trained_on_before(base) == []


def test_data_of_a_stage_that_is_behind():
    former = grown()[1].former_stages[0]
    pinned = {**former.pinned, "data_files": {"datasets": ["old"]}}
    check_former(former, BASE, 0, NAMES)
    with pytest.raises(CheckpointError, match=r"stages\[0\]\.data\.datasets: .*built-in corpus.* now, .*old.* when"):
        check_former(replace(former, pinned=pinned), BASE, 0, NAMES)


def test_data_of_a_stage_that_is_behind_may_move(tmp_path):
    """Under other names it is known by its digests; other data, or none, is a change."""
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        three_stages(folder)
    base, moved = (
        resolve_stages(load_config(str(tmp_path / folder / "stages.json")).stages, 1)[0] for folder in ("here", "there")
    )
    data = base.run.config.data
    pinned = run_changes.with_dataset(
        staged_manifest([base]), data_identity(data, base.run.config.model.vocab_size) or {}, base.run.config, NAMES
    )
    ended = StageEnd(4, base.run.config.training.model_dump(mode="json"), 1.0, [])
    (former,) = begin_stage(pinned, ended, replace(LONG, run=replace(base.run, max_steps=3)), NAMES).former_stages
    check_former(former, moved, 0, NAMES)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(tmp_path / "there" / f"second{suffix}", tmp_path / "there" / f"first{suffix}")
    with pytest.raises(CheckpointError, match=r"stages\[0\]\.data\.datasets: .*there.* now, .*here.* when"):
        check_former(former, moved, 0, NAMES)
    shutil.rmtree(tmp_path / "here")
    check_former(former, base, 0, NAMES)


def test_the_validation_history_is_that_of_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "validation/loss_at_4": 6.0},
        {"step": 5, "loss": 3.0},
        {"step": 5, "validation/loss_at_1": 5.5, "validation/loss_at_4": 5.0},
        {"step": 10, "validation/loss_at_4": 4.0},
        {"step": 10, "validation/first_loss_at_4": 4.5},
        {"step": 20, "validation/loss_at_4": 3.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 25, "validation/lo')
    assert validation_history(path, 0, 10) == [
        {"step": 0, "losses": {"4": 6.0}},
        {"step": 5, "losses": {"1": 5.5, "4": 5.0}},
        {"step": 10, "losses": {"4": 4.0}},
    ]
    assert validation_history(path, 10, 20) == [{"step": 20, "losses": {"4": 3.0}}]
    assert validation_history(tmp_path / "none", 0, 10) == []


def test_a_run_with_stages_ahead_is_not_finished(tmp_path, capsys):
    finished = load_main("launch/finished.py").main
    for manifest, step, code in ((0, 10, 75), (1, 30, 75), (2, 35, 0)):
        tag = checkpoint(tmp_path / str(manifest), grown()[manifest], step)
        (tag / "manifest.json").write_text("{}")
        assert finished(["--config", "tiny", "--run-dir", str(tmp_path / str(manifest))]) == code
        assert f"step {step} of 35 is saved" in capsys.readouterr().out


def test_a_former_stage_knows_its_end():
    former = FormerStage("a", (Phase(0, 4, 0), Phase(4, 9, 1)), {}, 1, 1, 0.1, None, [])
    assert former.end_step == 9
