"""The commands of the README, and of the tutorial, from top to bottom in one copy of the checkout each.

Those for a laptop run as they are written, trainings of tiny with fewer steps; `make test` and what installs are left
out. Those for a cluster meet a hostfile that names this host, and train nothing.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size
from tests.helpers.pretrain import ROOT, environment
from tests.helpers.readme import (
    CLUSTER,
    INSTALL,
    LAPTOP,
    OUTPUT,
    README,
    TUTORIAL,
    Command,
    fenced_blocks,
    marked_blocks,
)

LIMIT_S = 600
"""Of each command; on two idle cores the longest, a proxy of 1t, takes a minute or two."""
LEFT_OUT = ("make test", *INSTALL)
FEWER = {
    "training.warmup_steps": "1",
    "training.eval_interval": "0",
    "training.eval_batches": "2",
    "checkpoint.interval": "0",
    "monitor.sample_tokens": "4",
}
STEPS, MORE_STEPS = 4, 6
"""Of the quickstart, and of what goes on from it."""
FAR = "localhost"
SSH = """#!/bin/sh
# What runs on another host runs here: the words after the options, of which -o and -p have a value, and the name.
while case "$1" in -o|-p) shift 2 ;; -*) shift ;; *) false ;; esac; do :; done
shift
exec sh -c "$*"
"""


class Checkout:
    """A copy of the checkout's files, and the commands of an installed environment."""

    def __init__(self, folder: Path):
        self.root, programs = folder / "checkout", folder / "bin"
        copy_checkout(self.root)
        programs.mkdir()
        beside = Path(sys.executable).parent
        for name, words in {"python": [], "deepspeed": ["-m", "deepspeed.launcher.runner"]}.items():
            if not (beside / name).exists():
                _program(programs / name, f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        # The installed command would run the package that it was installed from, not the copy.
        _program(programs / "mythos-ds", f'#!/bin/sh\nexec {shlex.join([sys.executable, "-m", "mythos_ds"])} "$@"\n')
        _program(programs / "ssh", SSH)
        self.variables = environment()
        self.variables["PATH"] = os.pathsep.join([str(programs), str(beside), os.environ["PATH"]])
        self.variables["TORCH_EXTENSIONS_DIR"] = str(self.root / ".cache" / "torch_extensions")

    def run(self, command: str, expected: int = 0) -> str:
        """What a command prints. Fails when it ends with another exit code."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == expected, f"{command}: exit code {done.returncode}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout


def copy_checkout(folder: Path) -> None:
    """The checkout's files in `folder`."""
    for path in _files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target)


def _files() -> Iterator[Path]:
    """The files of the checkout that git keeps or would keep."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    yield from (Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    printed, ran = "", []
    for block in fenced_blocks(README.read_text()):
        if block.kind == OUTPUT:
            _check_lines(block.lines, printed)
            continue
        todo = [command for command in block.commands() if command.text not in LEFT_OUT]
        run = {LAPTOP: run_on_a_laptop, CLUSTER: run_without_a_cluster}[block.kind]
        printed = "".join(run(checkout, command) for command in todo)
        ran += [command.text for command in todo]
    assert len(ran) >= 10
    assert len(list(checkout.root.glob("runs/1t-proxy*/checkpoints/latest"))) == 2


@pytest.mark.slow
def test_the_tutorial_from_top_to_bottom(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    for block in marked_blocks(TUTORIAL.read_text()):
        for command in block.commands():
            words = shlex.split(command.text) if block.language == "sh" else []
            if {"pretrain"} & set(words) and "--run-dir" in words:
                fewer = {**FEWER, "training.max_steps": STEPS}
                command = Command(f"{command.text} {shlex.join(f'{key}={value}' for key, value in fewer.items())}")
            {LAPTOP: run_on_a_laptop, CLUSTER: run_without_a_cluster}[block.kind](checkout, command)
    assert (checkout.root / "own" / "hf" / "model.safetensors").is_file()
    assert len(list(checkout.root.glob("runs/1t-proxy*/checkpoints/latest"))) == 1


def run_on_a_laptop(checkout: Checkout, command: Command) -> str:
    """What the command prints; as written, but for the length of tiny's training and the environment of `make`."""
    text, words = command.text, shlex.split(command.text)
    if words[0] == "make":
        fewer = shlex.join(f"{key}={value}" for key, value in {**FEWER, "training.max_steps": STEPS}.items())
        text = shlex.join([*words, "VENV=", f"PYTHON={sys.executable}", f"ARGS={fewer}"])
        # What the tests run in is installed already; a copy does not know it.
        stamp = checkout.root / ".cache" / "installed"
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
        assert "--no-build-isolation -e ." not in checkout.run(f"{text} --dry-run"), "the copy is not to be installed"
    elif {"pretrain", "launch/pretrain.py"} & set(words) and "--resume" in words:
        text = shlex.join([*words, *(f"{key}={value}" for key, value in FEWER.items())])
        text += f" training.max_steps={MORE_STEPS}"
    expected = 2 if any(line.startswith("error:") for line in command.prints) else 0
    printed = checkout.run(text, expected)
    for line in command.prints:
        assert line in printed.splitlines(), f"{text}: does not print {line!r} but\n{printed}"
    return printed


def run_without_a_cluster(checkout: Checkout, command: Command) -> str:
    """What the command prints with this host as the only one: training's plan, and preflight's answer."""
    words = shlex.split(command.text)
    config = load_config(words[words.index("--config") + 1]).config
    processes = planned_world_size(config)
    hostfile = checkout.root / words[words.index("--hostfile") + 1]
    if {"preflight", "launch/preflight.py"} & set(words):
        hostfile.write_text(f"{FAR} slots={processes}\n")
        printed = checkout.run(f"{shlex.join(words)} --json", expected=1)
        report = json.loads(printed)
        assert report["processes"] == processes
        failed = {check["name"] for check in report["checks"] if check["ok"] is False}
        assert {"data"} <= failed <= {"data", "disk space"}, "a laptop lacks the run's data and space, and nothing else"
        return printed
    assert {"pretrain", "launch/pretrain.py"} & set(words), f"{command.text}: how is this to run without a cluster?"
    hostfile.write_text(f"{FAR} slots=2\n")
    printed = checkout.run(f"{shlex.join(words)} --dry-run --world-size {processes}")
    assert re.search(rf"processes +{processes}: ", printed), printed
    return printed


def _check_lines(lines: tuple[str, ...], printed: str) -> None:
    """Each line is there, whatever its numbers; one in parentheses describes what is left out."""
    found = _masked(printed)
    for line in lines:
        assert line.startswith("(") or _masked(line) in found, f"{line!r} is not printed:\n{printed[-4000:]}"


def _masked(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", text))
