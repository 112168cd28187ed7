"""Files around the code say what it says: the container, the hooks, the workflow, the Makefile, the metadata."""

import re
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement

import mythos_ds
from mythos_ds.config.secrets import is_secret
from tests.helpers.paths import ROOT
from tests.unit.test_locks import OF_A_MACHINE, PYTHONS

MAKEFILE = (ROOT / "Makefile").read_text()
INSTALL = re.compile(r"\b(?:pip3?|uv|conda|mamba|apt|apt-get)\s+(?:pip\s+)?install\s+(.*?)(?=&&|;|\||$)", re.M)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(words[0], words[1]) for line in lines.splitlines() if len(words := line.split(None, 1)) == 2]


def wrong_installs(text: str) -> list[str]:
    """What a Dockerfile installs beside the lock and the project itself, or with what those ask for."""
    found = [words for kind, line in instructions(text) if kind == "RUN" for words in INSTALL.findall(line)]
    allowed = {"-r requirements.lock", "."}
    options = re.compile(r"--no-cache-dir|--no-build-isolation|--no-deps|\s+")
    return [words for words in found if "--no-deps" not in words or options.sub(" ", words).strip() not in allowed]


def test_the_container_keeps_the_torch_of_its_base() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert len(INSTALL.findall(text)) == 2
    assert wrong_installs(text) == []
    lock = [Requirement(line).name for line in (ROOT / "requirements.lock").read_text().splitlines()]
    assert [name for name in lock if OF_A_MACHINE.match(name)] == []
    (base,) = [line for kind, line in instructions(text) if kind == "ARG" and line.startswith("BASE=")]
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)


@pytest.mark.parametrize(
    "line",
    [
        "pip install torch", "python3 -m pip install --no-cache-dir -r requirements.lock",
        "uv pip install --no-deps torch", "pip install --no-deps . && pip install .",
        "apt-get install -y python3-torch", "pip install --no-deps .[dev]",
    ],
)  # fmt: skip
def test_another_torch_would_be_found(line: str) -> None:
    assert wrong_installs(f"FROM x\nRUN true \\\n    && {line}\n")


def test_the_container_has_no_root_and_no_secrets() -> None:
    found = instructions((ROOT / "Dockerfile").read_text())
    users = [line for kind, line in found if kind == "USER"]
    assert users[-1:] == ["10001"]
    last = max(index for index, (kind, _) in enumerate(found) if kind == "USER")
    assert not [line for kind, line in found[last:] if kind in ("RUN", "COPY", "ADD")]
    names = [name for kind, line in found if kind in ("ENV", "ARG") for name in re.findall(r"(\w+)=", line)]
    assert "PIP_CONSTRAINT" in names
    assert [name for name in names if is_secret(name, "x")] == []
    ignored, *let_in = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"
    beside = re.findall(r'^    "mythos_ds\.[\w.]+": "(\w+)', (ROOT / "setup.py").read_text(), re.M)
    assert len(beside) == 4
    folders = {*beside, "mythos_ds", "mythos_hf", "mythos_vllm"}
    needed = {*folders, "setup.py", "pyproject.toml", "requirements.lock", "README.md", "LICENSE"}
    assert {line.removeprefix("!") for line in let_in if line.startswith("!")} == needed


def test_hooks_are_lint_with_the_locked_tools() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert {(hook["language"], "additional_dependencies" in hook) for hook in hooks} == {("system", False)}
    entries = [hook["entry"].removeprefix(".venv/bin/python").replace(" --force-exclude", "") for hook in hooks]
    linted = MAKEFILE.split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    assert entries == [line.removeprefix("\t$(PY)").removesuffix(" .") for line in linted]


def test_the_workflow_is_the_same_command_on_every_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert tuple(job["strategy"]["matrix"]["python"]) == PYTHONS
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step["run"] == ".ci/run"
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", MAKEFILE, re.M)
    assert step["env"]["TORCH"].split()[0] == torch
    assert workflow["permissions"] == {"contents": "read"}


def test_templates_are_forms() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
    assert len(forms) == 2
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= content.keys()
        ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
        assert len(set(ids)) == len(ids) > 0


def test_make_help_has_a_line_for_each_target() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    (targets,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    assert set(lines) == set(targets.split())
    first = next(line for line in MAKEFILE.splitlines() if re.match(r"[a-z-]+:", line))
    assert first.startswith("quickstart:"), "what plain make does"


def test_metadata_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert version("mythos_ds") == mythos_ds.__version__
    assert not re.findall(r"install_requires|extras_require|entry_points|version=", (ROOT / "setup.py").read_text())


def test_setup_says_what_takes_minutes_once(tmp_path):
    """With a Python that does nothing."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("setup.py", "pyproject.toml", "mythos_ds/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    line = "installing torch and the packages of requirements.lock, a few minutes\n"
    for expected in (line, ""):
        command = ["make", "--no-print-directory", "setup", "VENV=", "PYTHON=true"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == expected, done.stderr
