"""The command `mythos-ds`: its verbs, its help, and what it hands on."""

import json
import subprocess
import sys

import pytest

from mythos_ds import __main__ as command
from tests.helpers.paths import ROOT
from tests.helpers.pretrain import environment

HEAVY = ("torch", "pydantic", "deepspeed", "numpy", "rich")


def run(*arguments, cwd=None):
    """The completed process of `python -m mythos_ds`, outside the checkout unless told otherwise."""
    called = [sys.executable, "-m", "mythos_ds", *map(str, arguments)]
    return subprocess.run(
        called, env=environment(), cwd=cwd or "/", capture_output=True, text=True, check=False, timeout=120
    )


def test_every_main_is_a_verb():
    mains = [path for folder in ("tools", "launch") for path in (ROOT / folder).glob("[!_]*.py")]
    found = command.verbs()
    assert len(found) == len(mains), "two mains have one verb"
    assert {module.rpartition(".")[2] for module in found.values()} == {path.stem for path in mains}
    assert found["convert"] == "mythos_ds.tools.convert_checkpoint"
    assert found["average"] == "mythos_ds.tools.average_checkpoints"
    assert found["prepare-data"] == "mythos_ds.tools.prepare_data"
    assert found["pretrain"] == "mythos_ds.launch.pretrain"


@pytest.mark.parametrize("cwd", [None, ROOT], ids=["outside", "in the checkout"])
def test_help_lists_the_verbs_and_imports_nothing_heavy(cwd):
    program = (
        "import sys; from mythos_ds.__main__ import main; code = main(['--help']);"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]; sys.exit(code or ' '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd or "/", env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert set(lines) == set(command.verbs())
    assert all(line.strip().endswith(".") for line in lines.values()), "a sentence each"


def test_every_verb_is_in_one_group():
    listed = [name for names in command.GROUPS.values() for name in names]
    assert sorted(listed) == sorted(command.verbs())
    groups = [line for line in command.help_text().splitlines() if line.endswith(":")]
    assert groups == [f"{group}:" for group in command.GROUPS]


@pytest.mark.parametrize("arguments", [["plan"], ["--help"]])
def test_a_checkout_that_is_not_installed_says_so(arguments, tmp_path):
    """Without site-packages there is no finder of the mains; the package itself needs none for this message."""
    (tmp_path / "mythos_ds").symlink_to(ROOT / "mythos_ds")
    called = [sys.executable, "-S", "-m", "mythos_ds", *arguments]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not installed" in done.stderr
    assert "pip install -e ." in done.stderr
    assert done.stderr.endswith("[MDS780]\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "PASSIVE"), ({"OMP_NUM_THREADS": "2"}, None), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
)
def test_idle_threads_sleep_unless_threads_are_chosen(given, expected):
    program = (
        "import os, runpy; from mythos_ds import __main__ as command;"
        "runpy.run_module = lambda name, run_name: print(os.environ.get('OMP_WAIT_POLICY'));"
        "command.main(['env'])"
    )
    variables = {name: value for name, value in environment().items() if not name.startswith("OMP_")} | given
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"{expected}\n", done.stderr


def test_a_dry_run_loads_no_framework():
    """Which would take longer than the rest of it."""
    program = (
        "import atexit, sys; from mythos_ds.__main__ import main\n"
        "frameworks = {'torch', 'deepspeed', 'transformers', 'megatron'}\n"
        "atexit.register(lambda: print(*(frameworks & set(sys.modules)), end='', file=sys.stderr))\n"
        "main(['pretrain', '--config', '1t.json', '--dry-run'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "expert parallel" in done.stdout


def test_importing_the_package_loads_nothing_heavy():
    program = f"import sys, mythos_ds; sys.exit(' '.join(name for name in {HEAVY} if name in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_preflight_loads_torch_only_on_the_ranks():
    """A host with a broken torch still answers with its versions, and nothing of a library stands before the JSON."""
    program = (
        "import sys; from tests.helpers.mains import load_main; main = load_main('launch/preflight.py');"
        "sys.exit(' '.join(name for name in ('torch', 'deepspeed') if name in sys.modules) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_a_verb_the_verbs_are_named(capsys):
    assert command.main([]) == 2
    assert "  pretrain " in capsys.readouterr().out
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mythos-ds 0.")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("convret", "convert"),
        ("convert_checkpoint", "convert"),
        ("pretrain.py", "pretrain"),
        ("prepare_data", "prepare-data"),
    ],
)
def test_an_unknown_verb_is_one_message(given, nearest, capsys):
    assert command.main([given]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mythos-ds: given {given!r}; allowed: average, ")
    assert message.endswith(f"; nearest: {nearest}\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize("cwd", [None, ROOT], ids=["outside", "in the checkout"])
def test_usage_names_the_verb(cwd):
    done = run("convert", "--help", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mythos-ds convert [-h]")
    assert "mythos-ds convert --from mythos --to hf" in done.stdout


def test_an_error_names_the_verb_and_keeps_its_exit_code(tmp_path):
    done = run("verify", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("mythos-ds verify: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("before", [["--local_rank=0"], ["--local-rank", "0"]])
def test_a_launchers_rank_before_the_verb_is_handed_on(before):
    done = run(*before, "pretrain", "--config", "tiny", "--print-config")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["dim"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: given 0; allowed: at least 1"),
        (["--processes", "2", "--dry-run", "--world-size", "3"], "--processes: given 2 with --world-size 3; give one"),
        (["--processes", "3"], "training.global_batch_size"),
        (["--processes", "2", "model.n_expert=8"], "did you mean 'n_experts'?"),
        (
            ["--training.max_steps=10"],
            "a setting, no option; write training.max_steps=10 without --",
        ),
        (["--world-size", "3"], "--world-size: given 3; allowed: with --dry-run"),
    ],
)
def test_processes_that_cannot_be_started_are_one_message(arguments, message):
    done = run("pretrain", "--config", "tiny", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_plan_for_local_processes():
    done = run("pretrain", "--config", "tiny", "--processes", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2: " in next(line for line in done.stdout.splitlines() if line.startswith("processes"))


def test_env_names_versions_and_machine():
    done = run("env", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["Python"].startswith(sys.version.split()[0])
    assert found["torch"].startswith("2.")
    assert {"commit", "system", "cores", "deepspeed", "torch build", "GPUs", "DeepSpeed ops"} <= set(found)
    assert not [value for value in found.values() if str(value).startswith("not readable")]
