"""The public names: what each does, from a program that imports nothing else."""

import importlib
import inspect
import json
import math
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import mythos_ds
from mythos_ds.data.tokenizer import Tokenizer as PlainTokenizer
from mythos_ds.errors import CheckpointError, ConfigError, MythosError
from mythos_ds.weights.checksums import seal
from mythos_ds.weights.model_folder import load_model, save_model
from mythos_ds.weights.writer import checksum
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import SMALL, environment

TINY = ROOT / "models" / "tiny"
SMALLER = [one for one in SMALL if one.startswith("model.")]
USES = [*(ROOT / "examples").glob("*.py"), *(ROOT / "tests").rglob("test_*.py")]


def run_python(program: str, cwd: Path) -> str:
    """What a program prints in a process of its own, outside the checkout."""
    called = [sys.executable, "-c", program]
    done = subprocess.run(called, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def in_empty(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_public_names_outlive_the_import_of_every_module():
    """A package of a public name would take its place once it is imported."""
    importing = (
        "import importlib, pkgutil, mythos_ds\n"
        "from mythos_ds.__main__ import verbs\n"
        "for found in pkgutil.walk_packages(mythos_ds.__path__, 'mythos_ds.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)\n"
        "for module in verbs().values():\n"
        "    importlib.import_module(module)\n"
        "print(*(name for name in mythos_ds.__all__ if not callable(getattr(mythos_ds, name))))\n"
    )
    assert run_python(importing, Path("/")).strip() == ""
    modules = {found.name for found in pkgutil.iter_modules(mythos_ds.__path__)}
    assert not modules & set(mythos_ds.__all__)


def test_importing_it_loads_neither_torch_nor_pydantic():
    program = "import sys, mythos_ds.api; print(*({'torch', 'pydantic', 'deepspeed'} & set(sys.modules)))"
    assert run_python(program, Path("/")).strip() == ""


def test_the_package_hands_on_the_names_of_the_api():
    api = importlib.import_module("mythos_ds.api")
    assert sorted(mythos_ds.__all__) == sorted(api.__all__)
    assert set(mythos_ds.__all__) | {"__version__"} <= set(dir(mythos_ds))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mythos_ds.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        api.nothing  # noqa: B018


@pytest.mark.parametrize("name", mythos_ds.__all__)
def test_every_public_name_is_described_and_used(name):
    assert inspect.getdoc(getattr(mythos_ds, name))
    assert any(f"mythos_ds.{name}" in text or f"import {name}" in text for text in map(Path.read_text, USES))


def test_a_configuration_by_preset_file_and_overrides(tmp_path):
    config = mythos_ds.load_config("tiny", ["training.seed=7"])
    assert isinstance(config, mythos_ds.RunConfig)
    assert isinstance(config.model, mythos_ds.ModelConfig)
    assert config.training.seed == 7
    path = tmp_path / "own.json"
    shutil.copyfile(ROOT / "ds_configs" / "tiny.json", path)
    assert mythos_ds.load_config(path) == mythos_ds.load_config("tiny")
    with pytest.raises(ConfigError, match="did you mean 'n_experts'"):
        mythos_ds.load_config("tiny", ["model.n_expert=8"])


def test_a_new_model_steps_and_is_evaluated():
    model = mythos_ds.MythosModel.from_preset("tiny", SMALLER, seed=3)
    assert model.training
    assert torch.equal(model.embed.weight, mythos_ds.MythosModel.from_preset("tiny", SMALLER, seed=3).embed.weight)
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = mythos_ds.evaluate(model, [tokens], [2])[2]
    for _ in range(5):
        logits = model(tokens[:, :-1], n_loops=2)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mythos_ds.evaluate(model, [tokens], [2])[2] < before
    assert model.training, "evaluation gives the mode back"


def test_evaluation_is_the_mean_over_tokens():
    model = mythos_ds.MythosModel.from_pretrained(TINY)
    first, second = torch.randint(0, 4096, (2, 12)), torch.randint(0, 4096, (1, 5))
    found = mythos_ds.evaluate(model, iter([first, second]), [4, 1])
    assert list(found) == [1, 4]
    losses = []
    for tokens in (first, second):
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens, n_loops=4), -1)
        losses += [
            -float(log_p[row, at, tokens[row, at + 1]])
            for row in range(tokens.shape[0])
            for at in range(tokens.shape[1] - 1)
        ]
    assert math.isclose(found[4], sum(losses) / len(losses), rel_tol=1e-5)
    batch = {"tokens": first[:, :-1], "targets": first[:, 1:], "positions": torch.arange(11).expand(2, 11)}
    assert math.isclose(mythos_ds.evaluate(model, [batch])[4], mythos_ds.evaluate(model, [first])[4], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("data", "loops", "message"),
    [
        ([], [1], "data: no token"),
        ([torch.zeros(1, 1, dtype=torch.int64)], [1], "data: no token"),
        ([], [0, 2], "loops: given"),
    ],
)
def test_evaluation_says_what_is_wrong(data, loops, message):
    with pytest.raises(ConfigError, match=message):
        mythos_ds.evaluate(mythos_ds.MythosModel.from_pretrained(TINY), data, loops)


def test_the_built_in_model_and_a_folder_of_its_name(in_empty):
    built_in = mythos_ds.MythosModel.from_pretrained("tiny")
    assert not built_in.training
    assert torch.equal(built_in.embed.weight, load_model(TINY).embed.weight)
    with pytest.raises(CheckpointError, match=r'tiny2: no such folder .*; .* or "tiny"; nearest: "tiny"'):
        mythos_ds.MythosModel.from_pretrained("tiny2")
    assert mythos_ds.Tokenizer.load("tiny").vocab_size == built_in.config.vocab_size
    (in_empty / "tiny").mkdir()
    with pytest.raises(CheckpointError, match="tiny: no complete checkpoint"):
        mythos_ds.MythosModel.from_pretrained("tiny")


def test_loading_and_generating_import_no_deepspeed(tmp_path):
    program = (
        "import sys, mythos_ds\n"
        f"model = mythos_ds.MythosModel.from_pretrained({str(TINY)!r})\n"
        "mythos_ds.generate(model, 'def', tokenizer='tiny', new_tokens=2)\n"
        "mythos_ds.generate('tiny', 'def', new_tokens=2)\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'deepspeed'))\n"
    )
    assert run_python(program, tmp_path).strip() == ""


def test_planning_imports_no_deepspeed(tmp_path):
    program = (
        "import atexit, sys, mythos_ds\n"
        "import mythos_ds.plan.compare, mythos_ds.plan.report, mythos_ds.plan.run_plan\n"
        "from mythos_ds.__main__ import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'deepspeed' in sys.modules))\n"
        "assert str(mythos_ds.plan_run('tiny', gpus=2, gpu='h100'))\n"
        "main(['plan', '--config', 'tiny', '--gpus', '2', '--gpu', 'h100', '--compare'])\n"  # ends the process
    )
    assert run_python(program, tmp_path).splitlines()[-1] == "True False"


def test_generation_takes_a_model_or_its_source(in_empty):
    options: dict[str, Any] = {"new_tokens": 8, "temperature": 0, "loops": 2}
    text = mythos_ds.generate("tiny", "def main(", **options)
    assert text
    model, tokenizer = mythos_ds.MythosModel.from_pretrained("tiny"), mythos_ds.Tokenizer.load(str(TINY))
    assert isinstance(tokenizer, PlainTokenizer)
    for own in (tokenizer, "tiny", TINY, TINY / "tokenizer.model"):
        assert mythos_ds.generate(model, "def main(", tokenizer=own, **options) == text
    assert mythos_ds.generate(model, "def main(", tokenizer="tiny", **{**options, "temperature": 1e-320}) == text
    drawn = [mythos_ds.generate("tiny", "def main(", new_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loops": 0}, "loops: given 0; allowed: 1 or more; nearest: 1"),
        ({"new_tokens": 0}, "new_tokens: given 0"),
        ({"temperature": -1}, "temperature: given -1"),
        ({"temperature": math.nan}, "temperature: given nan; allowed"),
        ({"temperature": math.inf}, "temperature: given inf; allowed"),
        ({"loops": 10**12}, "loops: given 1000000000000; allowed: 1 to 4096"),
        ({"new_tokens": 10**30}, "new_tokens: given 1000"),
        ({"seed": 10**30}, "seed: given 1000"),
        ({"tokenizer": None}, "tokenizer: not given"),
        ({"tokenizer": "nothing.model"}, "tokenizer nothing.model not found"),
    ],
)
def test_generation_says_what_is_wrong(arguments, message, in_empty):
    model = mythos_ds.MythosModel.from_pretrained(TINY)
    with pytest.raises(MythosError, match=message):
        mythos_ds.generate(model, "def", **{"tokenizer": "tiny", **arguments})


def test_a_conversion_there_and_back(in_empty):
    notes = mythos_ds.convert("tiny", "hf", dtype="float32")
    assert [note.partition(":")[0] for note in notes] == ["cache of a server", "tensor parallel"]
    mythos_ds.convert("hf", "back", from_format="hf", to_format="mythos")
    before, after = load_model(TINY).state_dict(), load_model("back").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ConfigError, match="destination: given hf, which is the source"):
        mythos_ds.convert("hf", "hf", from_format="hf", to_format="mythos")
    with pytest.raises(ConfigError, match="layers: not an option of a conversion"):
        mythos_ds.convert("hf", "x", layers=3)


def test_weights_that_are_not_those_that_were_written_are_refused(in_empty):
    opened = mythos_ds.MythosModel.from_pretrained
    save_model(opened("tiny"), "own", {})
    opened("own")  # there are no checksums yet
    written = asdict(checksum(Path("own/model.safetensors")))
    content = {"format": 1, "job": "", "files": {"model.safetensors": written}}
    Path("own/checksums.json").write_text(json.dumps(content))
    seal(Path("own"), json.loads(Path("own/config.json").read_text()))
    opened("own")
    weights = bytearray(Path("own/model.safetensors").read_bytes())
    weights[-100] ^= 1
    Path("own/model.safetensors").write_bytes(weights)
    for refused in (lambda: opened("own"), lambda: mythos_ds.generate("own", "a", tokenizer="tiny")):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: its content is not what was written"):
            refused()


def test_a_plan():
    plan = mythos_ds.plan_run("tiny", gpus=8, gpu="h100", tokens=1e9, overrides=["training.global_batch_size=64"])
    assert plan.fits
    assert plan.numbers["gpus"] == 8
    assert str(plan).startswith("tiny on 8 h100: fits: ")
    with pytest.raises(ConfigError, match="--gpus and --gpu: not given"):
        mythos_ds.plan_run(mythos_ds.load_config("tiny"))


def test_training_in_this_process_wants_a_directory_for_a_configuration_made_here():
    with pytest.raises(ConfigError, match="run_dir: not given"):
        mythos_ds.pretrain(mythos_ds.load_config("tiny", ["parallel.ep_size=1"]))
    with pytest.raises(ConfigError, match="did you mean 'n_experts'"):
        mythos_ds.pretrain(mythos_ds.load_config("tiny"), run_dir="x", overrides=["model.n_expert=1"])


def test_a_run_is_trained_and_its_model_is_merged_in_memory(tmp_path):
    """In a process of its own, which ends with the engine's threads."""
    from tests.helpers.pretrain import small_data

    overrides = [*SMALL, *small_data(tmp_path), "training.max_steps=1", "training.warmup_steps=0", "parallel.ep_size=1"]
    program = f"""
import os, mythos_ds, torch
from mythos_ds.checkpoint import manifest
config = mythos_ds.load_config("tiny", {overrides!r})
class Steps(mythos_ds.Callback):
    seen = []
    def after_step(self, state):
        self.seen.append(state.step)
run = mythos_ds.pretrain(config, run_dir="run", overrides=["training.seed=5"], callbacks=[Steps()])
assert Steps.seen == [1], Steps.seen
model = mythos_ds.MythosModel.from_pretrained(run)
one = mythos_ds.MythosModel.from_pretrained(str(run / "checkpoints" / "step_00000001"))
assert all(torch.equal(value, one.state_dict()[name]) for name, value in model.state_dict().items())
fresh = mythos_ds.MythosModel.from_preset("tiny", {overrides!r}, seed=5)
assert not torch.equal(model.embed.weight, fresh.embed.weight)
verify, verified = manifest.verify, []
def counted(tag, *arguments):
    verified.append(tag)
    return verify(tag, *arguments)
manifest.verify = counted
print(repr(mythos_ds.generate(run, "a", new_tokens=2)), flush=True)
assert len(verified) == 1, verified
torch.save(model.state_dict(), "model.pt")
os._exit(0)
"""
    run_python(program, tmp_path)
    assert os.listdir(tmp_path / "run" / "checkpoints")
    merge = [sys.executable, "-m", "mythos_ds", "merge", "run", "--output", "merged"]
    subprocess.run(merge, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=300)
    merged = load_model(tmp_path / "merged").state_dict()
    in_memory = torch.load(tmp_path / "model.pt")
    assert set(merged) == set(in_memory)
    assert all(torch.equal(value, in_memory[name]) for name, value in merged.items())
