"""A file's list of training stages: what is inherited, what may change, and every problem told with its place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve_stages, whole_file
from mythos_ds.config.training_stages import stages_from
from mythos_ds.errors import ConfigError
from tests.helpers.mains import load_main

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def file(folder: Path, *stages: Any, **sections: Any) -> str:
    """A run's file: tiny with a list of stages; sections: what differs from tiny."""
    content = json.loads(load_config("tiny").text)
    for section, changes in sections.items():
        content[section] = {**content[section], **changes}
    path = folder / "run.json"
    path.write_text(json.dumps({**content, "stages": list(stages)}))
    return str(path)


def problems(name: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_stages(load_config(name, overrides).stages, 1)
    return list(caught.value.problems)


LONG = {"name": "long", "model": {"rope_scaling": YARN}, "training": {"max_steps": 50, "seq_len": 1024}}
ANNEAL = {"name": "anneal", "training": {"max_tokens": 10**6, "schedule": "constant", "decay_fraction": None}}


def test_each_stage_starts_with_the_settings_of_the_one_before(tmp_path):
    name = file(tmp_path, {"name": "base", "training": {"lr": 0.5}}, LONG, ANNEAL)
    loaded = load_config(
        name, ["training.weight_decay=0.2", "stages.long.training.lr=0.25", "stages.2.data.num_workers=1"]
    )
    base, long, anneal = loaded.stages
    assert loaded.config == base.config
    assert [stage.name for stage in loaded.stages] == ["base", "long", "anneal"]
    trained = [stage.config.training for stage in loaded.stages]
    assert [training.lr for training in trained] == [0.5, 0.25, 0.25]
    assert [training.weight_decay for training in trained] == [0.2] * 3
    assert [training.seq_len for training in trained] == [256, 1024, 1024]
    assert [(training.max_steps, training.max_tokens) for training in trained[1:]] == [(50, None), (None, 10**6)]
    assert anneal.config.model.rope_scaling == long.config.model.rope_scaling is not None
    assert base.config.model.rope_scaling is None
    assert (long.config.data.num_workers, anneal.config.data.num_workers) == (base.config.data.num_workers, 1)
    assert trained[2].decay_fraction == 0.2


def test_a_ramp_is_the_stages_own(tmp_path):
    ramp = {"micro_batch_size": 1, "global_batch_ramp": {"start": 2, "increment": 2, "samples": 40}}
    stages = load_config(file(tmp_path, {"name": "base"}, LONG, training=ramp)).stages
    assert stages[0].config.training.global_batch_ramp is not None
    assert stages[1].config.training.global_batch_ramp is None


def test_data_of_one_kind_replaces_the_other(tmp_path):
    other = {**LONG, "data": {"datasets": [{"prefix": "x"}], "tokenizer": "t"}}
    stages = load_config(file(tmp_path, {"name": "base"}, other)).stages
    assert stages[0].config.data.corpus == "builtin"
    assert (stages[1].config.data.corpus, stages[1].config.data.tokenizer) == (None, "t")


def test_every_problem_of_every_stage_is_told_with_its_place(tmp_path):
    wrong = {
        "name": "long",
        "model": {"dim": 64, "rope_thetta": 1.0},
        "training": {"optimizer": "sgd", "seed": 3, "global_batch_size": 7, "seqlen": 5},
        "parallel": {"zero_stage": 1},
        "dta": {},
    }
    found = "\n".join(problems(file(tmp_path, {"name": "base"}, wrong, {"name": "long"}, {"name": "3"}, 5)))
    for line in (
        "stages[1].model.dim: given in a stage; the weights depend on it; allowed: rope_theta, rope_scaling,",
        "stages[1].model.rope_thetta: unknown key; did you mean 'rope_theta'?",
        "stages[1].training.optimizer: given in a stage; allowed: in the file's own section, for all stages",
        "stages[1].training.seed: given in a stage",
        "stages[1].training.seqlen: unknown key; did you mean 'seq_len'?",
        "stages[1].training.micro_batch_size: 4 given; allowed: divisors of global_batch_size = 7",
        "stages[1].training.max_steps: missing; required: the stage's own length",
        "stages[1].parallel: given in a stage; it is the same in all stages of a file",
        "--resume OLD --run-dir NEW --stage NAME",
        "stages[1].dta: unknown key; did you mean 'data'?",
        'stages[2].name: "long" names two stages',
        'stages[3].name: "3" given; allowed: letters, digits',
        "stages[4]: 5 given; allowed: an object",
    ):
        assert line in found, line
    assert found.count("seqlen") == 1, "what a stage has inherited is told once"


def test_an_inherited_setting_without_effect_is_told_how_to_go(tmp_path):
    stage = {"name": "anneal", "training": {"max_steps": 5, "schedule": "constant"}}
    found = problems(
        file(tmp_path, {"name": "base"}, stage, training={"schedule": "wsd", "decay_fraction": 0.5}),
        "training.warmup_steps=0",
    )
    assert "stages[1].training.decay_fraction: has no effect" in found[0]
    assert found[0].endswith("write null for it in this stage")


def test_loops_of_a_stage(tmp_path):
    more = {"name": "more", "model": {"max_loops": 20, "mean_recurrence": 5}, "training": {"max_steps": 500}}
    name = file(tmp_path, {"name": "base"}, more)
    lora = load_config(name, ["model.lora_rank=0"]).stages
    assert [stage.config.model.max_loops for stage in lora] == [16, 20]
    (found,) = problems(name, "model.lora_rank=2")
    assert "stages[1].model.max_loops: 20 given; allowed: 16, as before: the depth-wise LoRA" in found


def test_what_follows_from_the_processes_is_told_by_stage(tmp_path):
    stage = {"name": "long", "training": {"max_steps": 5, "warmup_steps": 9}}
    (found,) = problems(file(tmp_path, {"name": "base"}, stage))
    assert found.startswith("stages[1].training.warmup_steps: 9 given; allowed: less than the run's 5 steps")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.middle.training.lr=1", "no stage 'middle'"),
        ("stages.long.training=1", "allowed: section.key=value"),
        ("training.lr=1", "stage 'base' sets this; write stages.base.training.lr="),
    ],
)
def test_a_wrong_override_is_told(override, message, tmp_path):
    found = problems(file(tmp_path, {"name": "base", "training": {"lr": 0.5}}, LONG), override)
    assert any(message in problem for problem in found)


@pytest.mark.parametrize("stages", [[], {}, "base"])
def test_a_list_that_is_none(stages, tmp_path):
    path = Path(file(tmp_path))
    path.write_text(json.dumps({**json.loads(path.read_text()), "stages": stages}))
    assert "stages: " in problems(str(path))[0]


def test_the_whole_configuration_loads_as_the_file_does(tmp_path):
    """As --print-config writes it and a run's directory keeps it."""
    name = file(tmp_path, {"name": "base"}, LONG, ANNEAL)
    stages = resolve_stages(load_config(name).stages, 1)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(whole_file(stages)))
    assert resolve_stages(load_config(str(whole)).stages, 1) == stages
    assert list(json.loads(whole.read_text())["_derived"]) == ["base", "long", "anneal"]


def test_stages_from_one_on(tmp_path):
    stages = load_config(file(tmp_path, {"name": "base"}, LONG)).stages
    assert [stage.name for stage in stages_from(stages, "long", "run.json")] == ["long"]
    plain = load_config("tiny").stages
    (stage,) = stages_from(plain, "next", "tiny.json")
    assert (stage.name, stage.config) == ("next", plain[0].config)
    with pytest.raises(ConfigError, match=r"--stage: given 'lng'; run.json lists base, long; did you mean 'long'"):
        stages_from(stages, "lng", "run.json")
    with pytest.raises(ConfigError, match="--stage: given 'a b'"):
        stages_from(plain, "a b", "tiny.json")


@pytest.mark.parametrize("proxy", [[], ["--proxy"]])
def test_a_dry_run_from_a_stage_on_shows_where_its_depth_grows_from(proxy, tmp_path, capsys):
    main = load_main("launch/pretrain.py").main
    growing = {"max_steps": 50, "depth_curriculum_steps": 20}
    deeper = {"name": "deep", "model": {"mean_recurrence": 6}, "training": growing}
    grows = {"name": "deeper", "training": growing}
    name = file(tmp_path, {"name": "base"}, deeper, grows)
    told = {}
    for stage in (None, "deep", "deeper"):
        assert main(["--config", name, "--dry-run", *proxy, *(["--stage", stage] if stage else [])]) == 0
        told[stage] = re.findall(r"its mean grows from (\d+) over", capsys.readouterr().out)
    assert told == {None: ["4", "6"], "deep": ["4", "6"], "deeper": ["6"]}


def test_a_dry_run_shows_every_stage(tmp_path, capsys):
    main = load_main("launch/pretrain.py").main
    name = file(tmp_path, {"name": "base"}, LONG, ANNEAL)
    assert main(["--config", name, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "training stage 2 of 3: long\n" in said
    assert "50 steps" in said
    assert main(["--config", name, "--print-config", "--stage", "anneal"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == [{"name": "anneal"}]
    assert main(["--config", name, "--dry-run", "--proxy"]) == 0
    assert capsys.readouterr().out.count("training stage") == 3
