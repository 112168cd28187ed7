"""Reading a run's file: syntax, comments, duplicates, overrides, messages."""

import json
import subprocess
import sys

import pytest

from mythos_ds.config.loader import find_config, list_presets, load_config
from mythos_ds.errors import ConfigError
from tests.helpers.paths import ROOT


def problems(*overrides: str, name: str = "tiny") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return list(caught.value.problems)


@pytest.fixture
def tiny_json() -> dict:
    return json.loads(find_config("tiny").read_text())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.epsize=2", "parallel.epsize: unknown key; did you mean 'ep_size'?"),
        ("training.zero_stage=3", "training.zero_stage: unknown key; it belongs in 'parallel'"),
        (
            "model.attn_type=mqa",
            'model.attn_type: "mqa" given; allowed: "mla" or "gqa"; did you mean \'mla\'?',
        ),
        ("parallel.ep_size=atuo", "did you mean 'auto'?"),
        ("parallel.zero_stage=4", "4 given; allowed: 0 or 1 or 2 or 3; nearest: 3"),
        ("model.mean_recurrence=0", "0 given; allowed: an integer >= 1 and <= 4096; nearest: 1"),
        ('training.seq_len="256"', '"256" given; allowed: an integer >= 2 and <= 16777216; write 256 as a number'),
        ("training.max_steps=2e3", "2000.0 given; allowed: an integer >= 1 and <= 1e+12 or null; write 2000"),
        ("training.lr=fast", '"fast" given; allowed: a number > 0'),
        ("monitor.tensorboard=1", "1 given; allowed: true or false"),
        ("data.split=[1,2]", "data.split: [1, 2] given; allowed: a list of 3 numbers"),
        ("monitor.sample_prompts=[1]", "monitor.sample_prompts[0]: 1 given; allowed: a string"),
        ('data.datasets=[{"prefx":"a"}]', "data.datasets[0].prefx: unknown key; did you mean 'prefix'?"),
        ("model.dim.x=3", "'model.dim' is a value, not a section"),
        ("lr", "allowed: section.key=value"),
        ("max_steps=10", "; did you mean training.max_steps=10?"),
    ],
)
def test_message_says_where_what_and_nearest(override, expected):
    assert any(expected in problem for problem in problems(override))


def test_missing_keys_name_type_and_meaning(tmp_path, tiny_json):
    del tiny_json["training"]["lr"], tiny_json["data"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_json))
    found = problems(name=str(path))
    assert f"{path}: data: missing; required: an object (Where the tokens come from)" in found
    required = "training.lr: missing; required: a number > 0 and <= 1e+06 (Peak learning rate"
    assert any(required in line for line in found)


def test_all_problems_at_once():
    """A wrong value does not hide wrong combinations, and the source of each is named."""
    found = problems("model.dim=wide", "training.micro_batch_size=3", "deepspeed.train_batch_sze=4", "lora=1")
    assert len(found) == 4
    assert all(line.startswith("override") for line in found)
    assert sum("training.micro_batch_size" in line or "did you mean" in line for line in found) == 2


def test_syntax_error_has_line_and_column(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"model": {\n  "dim": 3,}\n}')
    (problem,) = problems(name=str(path))
    assert "run.json: line 2 column 1" in problem
    assert '"dim": 3,}' in problem


@pytest.mark.parametrize("text", ["", "[1]", "3"])
def test_a_file_without_an_object_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    assert len(problems(name=str(path))) == 1


def test_duplicate_keys_and_nan_are_errors(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"model": {"dim": 8, "dim": 16}, "training": {"lr": NaN}}')
    found = problems(name=str(path))
    assert any("model.dim: given twice" in line for line in found)
    assert any("NaN" in line for line in found)


def test_underscore_keys_are_comments_at_any_level(tmp_path, tiny_json):
    tiny_json["_note"] = tiny_json["training"]["_why"] = {"anything": [1]}
    tiny_json["deepspeed"] = {"_note": "x"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_json))
    loaded = load_config(str(path))
    assert loaded.config.deepspeed == {}
    assert loaded.text == path.read_text()
    assert loaded.path == path


def test_overrides_win_and_replace_their_alternative():
    config = load_config(
        "tiny", ["training.max_tokens=204800", "deepspeed.zero_optimization.overlap_comm=false"]
    ).config
    assert config.training.max_steps is None
    assert config.deepspeed["zero_optimization"]["overlap_comm"] is False
    config = load_config("1b", ["data.corpus=builtin", "data.tokenizer=null", "training.max_steps=2000"]).config
    assert config.data.datasets is None
    assert config.training.max_tokens is None


def test_unknown_name_lists_presets():
    (problem,) = problems(name="tinny.json")
    assert "did you mean 'tiny'?" in problem
    assert "1b, 3b, 10b, 50b, 100b, 500b, 1t" in problem
    assert list_presets() == ["tiny", "1b", "3b", "10b", "50b", "100b", "500b", "1t"]


def test_presets_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("1t.json").path == load_config("1t").path == ROOT / "ds_configs" / "1t.json"


def test_planning_imports_no_torch():
    code = """if True:
        import sys
        from mythos_ds.config.loader import load_config
        from mythos_ds.config.resolve import resolve
        from mythos_ds.costs.dry_run import dry_run_report
        dry_run_report(resolve(load_config("1t").config, 1024))
        sys.exit(bool({"torch", "deepspeed", "numpy"} & set(sys.modules)))
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
