"""The mains by their files, as in a checkout, and the names of models that they take."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.pretrain import environment

MAINS = sorted(path for folder in ("launch", "tools") for path in (ROOT / folder).glob("[!_]*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a main by its file in an empty folder; its exit code, and what it wrote to stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_file(path: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run_file


@pytest.mark.parametrize("path", MAINS, ids=lambda path: path.stem)
def test_every_file_shows_its_help(run, path):
    code, printed, _ = run(path, "--help")
    assert code == 0
    assert printed.startswith("usage: ")


def test_files_do_what_their_verbs_do(run):
    # Training ends its process itself.
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", "tiny.json", "--dry-run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    code, printed, _ = run(ROOT / "tools" / "plan.py", "--config", "1t.json")
    assert code == 0
    assert "1t.json on 1,024 h200, 2 training stages: fits" in printed


def test_the_built_in_model_is_converted_and_inspected_by_its_name(run, tmp_path):
    words = ["--from", "mythos", "--to", "hf", "--input", "tiny", "--output", "hf", "--dry-run", "--json"]
    code, printed, _ = run(ROOT / "tools" / "convert_checkpoint.py", *words)
    assert code == 0
    assert json.loads(printed)["estimate"]
    code, printed, _ = run(ROOT / "tools" / "inspect_checkpoint.py", "tiny", "--json")
    assert code == 0
    assert json.loads(printed)["tensors"]["weights"]
    (tmp_path / "tiny").mkdir()
    code, _, message = run(ROOT / "tools" / "inspect_checkpoint.py", "tiny")
    assert code == 2
    assert "tiny: no complete checkpoint" in message


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("loop_report", ["--checkpoint", "tiny", "--openmythos-config", "x.json"], "given with a model folder"),
        ("train_gate", ["--model", "tiny1", "--output", "x"], "tiny1: no such folder (looked for in "),
        ("inspect_checkpoint", ["tiny1"], 'nearest: "tiny"'),
    ],
)
def test_mains_know_the_name_of_the_built_in_model(run, name, arguments, message):
    code, _, printed = run(ROOT / "tools" / f"{name}.py", *arguments)
    assert code == 2
    assert message in printed


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (ROOT / "tools" / "merge_checkpoint.py", ["runs/x", "--output", ""]),
        (ROOT / "tools" / "verify_checkpoint.py", [""]),
        (ROOT / "tools" / "render_launch.py", ["slurm", "--config", "tiny.json", "--output", ""]),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_an_empty_path_is_refused(run, tmp_path, path, words):
    code, _, message = run(path, *words)
    assert code == 2
    assert "given ''; allowed: a path" in message
    assert list(tmp_path.iterdir()) == []
