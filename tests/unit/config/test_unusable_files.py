"""What a configuration's file, keys and values may be damaged with: always one message that says where."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mythos_ds.config import deepspeed_section, deepspeed_values
from mythos_ds.config.json_values import MAX_BYTES
from mythos_ds.config.loader import check_raw, find_config, load_config
from mythos_ds.errors import ConfigError
from tests.helpers.pretrain import environment
from tests.helpers.time_limit import at_most

SECRET = "hunter2hunter2"


def said(name: str, *overrides: str) -> str:
    """The message, which comes at once."""
    with pytest.raises(ConfigError) as caught, at_most(2.0, name[:80]):
        load_config(name, overrides)
    assert max(map(len, caught.value.problems)) < 700
    return str(caught.value)


@pytest.fixture
def whole() -> bytes:
    return find_config("tiny").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep; allowed: 64 levels"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"model": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deep"),
        (b'{"model": {"dim": ' + b"9" * 5001 + b"}}", "model.dim: a number of 5,001 digits given"),
        (b'{"model": {"\\ud800": 1}}', "model: the key '\\ud800' holds half of a surrogate pair"),
        (b'{"\\u0000": 1}', "the key '\\x00' holds a null character"),
        (b'{"data": {"data_dir": "a\\u0000b"}}', "data.data_dir: 'a\\x00b' holds a null character"),
        (b'{"data": {"data_dir": "\\udfff"}}', "data.data_dir: '\\udfff' holds half of a surrogate pair"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-16 or UTF-32"),
        ("{}".encode("utf-16-be"), "UTF-16 or UTF-32"),
        ("{}".encode("utf-32-le"), "UTF-16 or UTF-32"),
        (b'{\n"_a": "\xe9"}', "line 2: byte 0xe9 is no UTF-8 text"),
        (b'{"model": {}, "model": {}}', "model: given twice"),
        (b'{"training": {"lr": NaN}}', "NaN is not a number"),
        (b'{"training": {"lr": 1e999}}', "training.lr: inf given"),
        (b" " * (MAX_BYTES + 1), "bytes given; allowed: at most"),
    ],
)
def test_content(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    found = said(str(path))
    assert message in found
    assert "run.json" in found


def test_a_byte_order_mark_is_left_out(tmp_path, whole):
    path = tmp_path / "run.json"
    path.write_bytes(b"\xef\xbb\xbf" + whole)
    assert load_config(str(path)).config == load_config("tiny").config


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, message in (("pipe", "no regular file"), ("zero", "no regular file"), ("loop", "not readable (Too many")):
        assert message in said(str(tmp_path / name))
    assert "not readable (File name too long)" in said("a" * 300)
    assert "not readable (embedded null byte)" in said("a\0b")
    assert "no such file" in said(str(tmp_path / "absent" / "run.json"))
    assert "no such file" in said(str(tmp_path))
    assert "no such file" in said("\udcff\udcfe")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_what_may_not_be_read_is_said_as_such(tmp_path, whole):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    (folder / "run.json").write_bytes(whole)
    program = (
        "import os, sys; from mythos_ds.config.loader import load_config\n"
        f"os.setgid(65534); os.setuid(65534)\ntry: load_config({str(folder / 'run.json')!r})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"ConfigError {folder / 'run.json'}: not readable (Permission denied)\n", done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=" + "[" * 5000, "nested too deep"),
        ("training.seed=" + "1" * 5000, "training.seed: a number of 5,000 digits"),
        ("data.data_dir=\udcff", "data.data_dir: '\\udcff' holds half of a surrogate pair, or a byte that is no UTF-8"),
        ('data.data_dir="a\\u0000b"', "data.data_dir: 'a\\x00b' holds a null character"),
        (".".join(["a"] * 500) + "=1", "nested too deep"),
        ("model.dim.x.y=1", "'model.dim.x' is a value, not a section"),
    ],
)
def test_overrides(override, message):
    assert message in said("tiny", override)


def test_values_made_in_python():
    for raw, message in (
        ({"model": {1: 2}}, "the key 1 given; allowed: texts"),
        ({"model": {"dim": {1, 2}}}, "model.dim: a set given"),
        ({"model": {"dim": 10**5000}}, "more than 64 digits"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_raw(raw, [], Path("python.json"))


def test_damaged_bytes_never_escape_as_another_error(tmp_path, whole):
    generator, path = random.Random(0), tmp_path / "run.json"
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(generator.choice([1, 1, 3, 20])):
            at = generator.randrange(len(changed))
            changed[at : at + generator.choice([0, 1, 1, 5])] = generator.randbytes(generator.choice([0, 1, 1, 5]))
        path.write_bytes(changed[: generator.choice([len(changed), generator.randrange(len(changed))])])
        try:
            load_config(str(path))
        except ConfigError as error:
            found = str(error)
        else:
            continue
        assert "run.json" in found


@pytest.mark.parametrize(
    ("override", "variable"),
    [
        (f'deepspeed.comet={{"enabled": false, "api_key": "{SECRET}"}}', "COMET_API_KEY"),
        (f"deepspeed.comet.api_key={SECRET}", "COMET_API_KEY"),
        (f"deepspeed.comet.experiment_key={SECRET}", "COMET_EXPERIMENT_KEY"),
        (f"deepspeed.wandb.api_key={SECRET}", "WANDB_API_KEY"),
        (f'deepspeed.tensorboard={{"x": [{{"access_token": "{SECRET}"}}]}}', "environment variable"),
        (f"data.password={SECRET}", "environment variable"),
        (f"training.init_from=https://me:{SECRET}@host/weights", "leave the password out"),
        (f'data.datasets=[{{"prefix": "s3://me:{SECRET}@bucket/x"}}]', "leave the password out"),
        ("data.tokenizer=hf_" + "Ab3" * 12, "environment variable"),
    ],
)
def test_secrets_are_refused_and_not_repeated(override, variable):
    found = said("tiny", override)
    assert "a secret does not belong in a configuration" in found
    assert variable in found
    assert SECRET not in found


def test_secrets_in_comments_are_refused_too(tmp_path, whole):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"_wandb_api_key": SECRET, **json.loads(whole)}))
    assert "_wandb_api_key: a secret does not belong" in said(str(path))


@pytest.mark.parametrize(
    "comment",
    [
        {"_about": f"https://me:{SECRET}@host/x"},
        {"_about": "hf_" + "Ab3" * 12},
        {"_keys": {"wandb": {"apikey": SECRET}}},
        {"_keys": [{"note": {"wandb_key": SECRET}}]},
        {"_WANDB_API_KEY": [SECRET]},
        {"_pwd": SECRET},
    ],
)
@pytest.mark.parametrize("section", [None, "deepspeed", "model"])
def test_secrets_deep_in_comments_are_refused_and_not_repeated(section, comment, tmp_path, whole):
    """The run's directory has a copy of the file, comments and all."""
    path, content = tmp_path / "run.json", json.loads(whole)
    (content if section is None else content[section]).update(comment)
    path.write_text(json.dumps(content))
    found = said(str(path))
    assert "a secret does not belong in a configuration" in found
    assert SECRET not in found


def test_keys_without_a_secret_stay_allowed():
    values = ["training.max_tokens=10000000", "monitor.sample_tokens=9", 'deepspeed.wandb={"project": "tokens"}']
    assert load_config("tiny", values)


def test_every_key_of_deepspeed_that_may_be_set_has_its_values():
    free = {*deepspeed_section.KNOWN_KEYS} - {*deepspeed_section.DERIVED_KEYS, *deepspeed_section.UNSUPPORTED_KEYS}
    assert set(deepspeed_values.VALUES) == free - {"tensorboard"}
    refused = {*deepspeed_section.DERIVED_KEYS, *deepspeed_section.UNSUPPORTED_KEYS}
    zero = {key for key in deepspeed_section.KNOWN_ZERO_KEYS if f"zero_optimization.{key}" not in refused}
    assert set(deepspeed_values.VALUES["zero_optimization"]) == zero


@pytest.mark.parametrize("value", ['"abc"', "-1", "1e300", "[]", "{}", "[[1]]", '{"x": 1}', "12345678901234567890123"])
def test_values_of_deepspeed_are_taken_by_their_type_alone(value):
    """And what is taken, DeepSpeed's own classes take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in deepspeed_values.VALUES["zero_optimization"]:
        problems = deepspeed_values.check({"zero_optimization": {key: json.loads(value)}})
        assert problems, key
        assert problems[0][0] == f"deepspeed.zero_optimization.{key}"
    for key, kind in deepspeed_values.VALUES.items():
        if value == "{}" and isinstance(kind, dict):
            continue
        for name, message in deepspeed_values.check({key: json.loads(value)}):
            assert name.startswith(f"deepspeed.{key}")
            assert "allowed" in message or "unknown" in message
    taken = {"overlap_comm": True, "reduce_bucket_size": 5e8, "sub_group_size": 7, "stage3_max_live_parameters": 0}
    assert not deepspeed_values.check({"zero_optimization": taken})
    assert DeepSpeedZeroConfig(**taken).reduce_bucket_size == 500_000_000


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["deepspeed.gradient_predivide_factor=2"], "gradient_predivide_factor"),
        (["deepspeed.prescale_gradients=true"], "prescale_gradients"),
        (["deepspeed.gradient_allreduce_op=sum"], "gradient_allreduce_op"),
        (["parallel.zero_stage=2", "deepspeed.zero_optimization.contiguous_gradients=false"], "contiguous_gradients"),
        (["parallel.zero_stage=1", "deepspeed.zero_optimization.reduce_scatter=false"], "reduce_scatter"),
        (["deepspeed.no_such_writer.enabled=true"], "no_such_writer"),
    ],
)
def test_what_deepspeed_refuses_when_the_model_is_built_is_refused_before(overrides, key):
    assert f"{key}" in said("tiny", *overrides)


def test_writers_of_deepspeeds_that_cannot_be_used_are_told(monkeypatch):
    monkeypatch.setattr(deepspeed_values, "find_spec", lambda name: None)
    refused = said("tiny", 'deepspeed.wandb={"enabled": true, "project": "x"}')
    assert "deepspeed.wandb.enabled: true given" in refused
    assert "monitor.wandb=PROJECT" in refused
    assert "comet_ml is not installed" in said("tiny", "deepspeed.comet.enabled=true")
    assert load_config("tiny", ['deepspeed.wandb={"enabled": false, "project": "x"}'])
