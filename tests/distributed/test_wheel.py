"""What is installed from a wheel works alone: read-only, in an environment of its own, from an empty folder.

The environment has the packages of this one by a path file, so that nothing is downloaded.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_readme import copy_checkout
from tests.helpers.distributed import free_port
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import SMALL, environment, metrics, small_data

LIMIT_S = 400
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEN_LINES = """
import torch
from mythos_ds import MythosModel, generate

model = MythosModel.from_preset("tiny", ["model.dim=64"])
tokens = torch.randint(0, model.config.vocab_size, (2, 17))
logits = model(tokens[:, :-1], n_loops=4)
torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
torch.optim.AdamW(model.parameters()).step()
print(repr(generate(MythosModel.from_pretrained("tiny"), "def main(", tokenizer="tiny", new_tokens=8)))
"""


def losses_of(run: Path) -> list[float]:
    """The losses of a run, step by step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


class Installed:
    """An environment with the wheel in it, which nobody may write to."""

    def __init__(self, folder: Path):
        checkout, wheels, self.environment = folder / "checkout", folder / "wheels", folder / "environment"
        copy_checkout(checkout)
        self._plain(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, checkout]
        )
        self._plain([sys.executable, "-m", "venv", "--without-pip", self.environment])
        self.python = self.environment / "bin" / "python"
        (wheel,) = wheels.glob("mythos_ds-*.whl")
        self._plain([sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", wheel])
        (self.packages,) = self.environment.glob("lib/python*/site-packages")
        (self.packages / "shared.pth").write_text("\n".join(sorted(_package_folders())) + "\n")
        for path in self.packages.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        self.files = self.listing()

    @staticmethod
    def _plain(command: list[str | Path]) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of every installed file."""
        found = ((path, path.stat()) for path in self.packages.rglob("*"))
        return {str(path): (state.st_size, state.st_mtime_ns) for path, state in found}

    def run(self, *words: str | Path, cwd: Path, expected: int = 0) -> str:
        """What a command prints; its first word is a program of the environment, or "python"."""
        command = [str(self.environment / "bin" / words[0]), *map(str, words[1:])]
        variables = {
            **environment(),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{self.environment}/bin:{os.environ['PATH']}",
        }
        done = subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
        assert done.returncode == expected, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def _package_folders() -> set[str]:
    """Where this environment's packages lie."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "deepspeed", "pydantic", "rich", "sentencepiece")]
    return {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, installed once; at the end nothing in it has changed."""
    made = Installed(tmp_path_factory.mktemp("wheel"))
    yield made
    assert made.listing() == made.files, "something was written where the package is installed"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides of a small run of three steps."""
    return [*SMALL, *small_data(tmp_path_factory.mktemp("data")), "training.max_steps=3"]


@pytest.fixture(scope="module")
def trained(installed, settings, tmp_path_factory):
    """A folder in which three launchers have trained the same run for three steps, and its losses."""
    folder = tmp_path_factory.mktemp("empty")
    ports = [["--master_port", str(free_port())] for _ in range(2)]
    torchrun = ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", *ports[0]]
    deepspeed = ["python", "-m", "deepspeed.launcher.runner", "--num_gpus", "2", *ports[1]]
    launchers = {
        "processes": ["mythos-ds", "pretrain", "--processes", "2"],
        "torchrun": [*torchrun, "-m", "mythos_ds", "pretrain"],
        "deepspeed": [*deepspeed, "--module", "mythos_ds", "pretrain"],
    }
    losses = {}
    for name, launcher in launchers.items():
        installed.run(*launcher, "--config", "tiny.json", "--run-dir", name, *settings, cwd=folder)
        losses[name] = losses_of(folder / name)
    return folder, losses


@pytest.mark.slow
def test_the_wheel_holds_what_an_installed_user_needs_and_no_more(installed, tmp_path):
    printed = installed.run("mythos-ds", "--help", cwd=tmp_path)
    verbs = set(re.findall(r"(?m)^  (\S+)  ", printed))
    assert {"pretrain", "plan", "convert", "merge", "verify", "generate", "render-launch", "env"} <= verbs
    assert not {"config-schema", "gpu-acceptance", "preset-table", "test-environments"} & verbs
    top = {path.name for path in installed.packages.iterdir() if path.is_dir() and "." not in path.name}
    assert top - {"__pycache__"} == {"mythos_ds", "mythos_hf", "mythos_vllm"}
    assert (installed.packages / "mythos_ds" / "py.typed").is_file()
    found = json.loads(
        installed.run("python", "-m", "mythos_ds", "env", "--json", cwd=tmp_path).partition("\n}")[0] + "}"
    )
    assert found["folder"] == str(installed.packages / "mythos_ds")


@pytest.mark.slow
def test_plans_need_no_file(installed, tmp_path):
    assert "parameters" in installed.run("mythos-ds", "pretrain", "--config", "tiny.json", "--dry-run", cwd=tmp_path)
    assert "1t.json on 1,024 h200, 2 training stages: fits" in installed.run(
        "mythos-ds", "plan", "--config", "1t.json", cwd=tmp_path
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_three_launchers_train_the_same_run(trained):
    _, losses = trained
    assert len(losses["processes"]) == 3
    assert losses["processes"] == losses["torchrun"] == losses["deepspeed"]


@pytest.mark.slow
def test_what_was_trained_is_merged_verified_and_converted(installed, trained):
    folder, _ = trained
    installed.run("mythos-ds", "merge", "processes", "--output", "merged", cwd=folder)
    assert "merged: whole" in installed.run("mythos-ds", "verify", "merged", cwd=folder)
    assert "step_00000003: whole" in installed.run("mythos-ds", "verify", "deepspeed", cwd=folder)
    to_hf = ["--from", "mythos", "--to", "hf", "--input", "merged", "--output", "hf"]
    installed.run("mythos-ds", "convert", *to_hf, cwd=folder)
    assert json.loads((folder / "hf" / "config.json").read_text())["model_type"] == "mythos"


@pytest.mark.slow
def test_it_speaks_and_renders_job_files(installed, tmp_path):
    spoken = installed.run("mythos-ds", "generate", "def main(", "--model", "tiny", "--tokens", "8", cwd=tmp_path)
    assert "def main(" in spoken
    installed.run("mythos-ds", "render-launch", "slurm", "--config", "1t.json", "--output", "1t.sbatch", cwd=tmp_path)
    assert "launch/" not in (tmp_path / "1t.sbatch").read_text()
    installed.run("mythos-ds", "render-launch", "torchrun", "--output", "torchrun.sh", cwd=tmp_path)
    for name in ("1t.sbatch", "torchrun.sh"):
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)


@pytest.mark.slow
def test_bad_input_is_one_message_that_names_a_command(installed, tmp_path):
    words = ["--config", "tiny.json", "data.tokenizer=none.model", 'data.datasets=[{"prefix": "none"}]']
    printed = installed.run("mythos-ds", "pretrain", *words, "parallel.ep_size=1", cwd=tmp_path, expected=2)
    assert "mythos-ds train-tokenizer" in printed
    assert "tools/" not in printed
    wrong = ["pretrain", "--config", "tiny.json", "--processes", "2", "model.n_expert=8"]
    printed = installed.run("mythos-ds", *wrong, cwd=tmp_path, expected=2)
    assert printed.count("error:") == 1


@pytest.mark.slow
def test_ten_lines_of_python(installed, tmp_path):
    assert len(TEN_LINES.strip().splitlines()) <= 10
    installed.run("python", "-c", TEN_LINES, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(installed, example, tmp_path):
    assert installed.run("python", example, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["inside the checkout", "outside"])
def test_an_editable_install_does_what_the_wheel_does(inside, trained, settings, tmp_path):
    """It reads what the wheel wrote, and trains the same run."""
    empty, output = tmp_path / "empty", tmp_path / "output"
    empty.mkdir()
    cwd = ROOT if inside else empty

    def run(*words: str | Path) -> str:
        command = [sys.executable, "-m", "mythos_ds", *map(str, words)]
        done = subprocess.run(
            command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    assert "parameters" in run("pretrain", "--config", "tiny.json", "--dry-run")
    assert "1t.json on 1,024 h200, 2 training stages: fits" in run("plan", "--config", "1t.json")
    assert run("generate", "def", "--model", "tiny", "--tokens", "1").startswith("def")
    folder, losses = trained
    run("pretrain", "--processes", "2", "--config", "tiny.json", "--run-dir", output / "run", *settings)
    assert losses_of(output / "run") == losses["processes"]
    for source, merged in ((output / "run", output / "own"), (folder / "processes", output / "wheels")):
        run("merge", source, "--output", merged)
        assert f"{merged}: whole" in run("verify", merged)
    run("convert", "--from", "mythos", "--to", "hf", "--input", output / "own", "--output", output / "hf")
    assert json.loads((output / "hf" / "config.json").read_text())["model_type"] == "mythos"
    assert not list(empty.iterdir()), "something was written where the command was called"
