"""Run the tests with other versions of the libraries, in environments of their own under .cache.

    make test-hf        the export's tests, those with accelerate, peft and bitsandbytes too, on the oldest and the
                        newest transformers that are allowed, without DeepSpeed
    make test-newest    the default suite with the newest published versions, upper bounds lifted

Runs in a checkout, in the environment that `make setup` makes.
"""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mythos_ds.errors import MythosError
from mythos_ds.formatting import plain_table
from mythos_ds.mains import run_tool

ROOT = Path(__file__).resolve().parents[1]
EXPORT_TESTS = ("tests/parity/test_hf*.py", "tests/unit/conversion/test_hf*.py", "tests/optional/hf_*.py")
EXPORT_NEEDS = ("numpy", "packaging", "psutil", "pydantic", "pytest", "rich", "safetensors", "sentencepiece")
"""What the export's tests import beside torch, transformers and this project; psutil for continuous batching on CPU."""
EXPORT_COMPANIONS = ("accelerate==1.15.0", "bitsandbytes==0.50.2", "peft==0.21.2")
"""What people train and quantise the export with, and tests/optional runs: no part of any other environment."""
OLDER_WITH_TRANSFORMERS = {"transformers", "huggingface-hub", "tokenizers"}
"""The libraries whose versions follow the version of transformers."""


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("transformers", "newest"))
    parser.add_argument("--torch", required=True, metavar="REQUIREMENT", help="what pip installs for torch")
    parser.add_argument(
        "--without-dependencies", action="append", default=[], metavar="REQUIREMENT", help="also installed, alone"
    )
    return run_tool(parser, work, argv)


def work(arguments: Namespace) -> None:
    if not (ROOT / "requirements.lock").is_file():
        raise MythosError(f"{ROOT}: no requirements.lock; allowed: run in a checkout of the project")
    broken = try_transformers(arguments) if arguments.what == "transformers" else try_newest(arguments)
    if broken:
        raise MythosError(f"{len(broken)} tests broke: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}")


def direct_requirements() -> dict[str, Requirement]:
    """The requirements of the package and of its extra `dev`, by name, without torch."""
    declared = [Requirement(line) for line in requires("mythos_ds") or []]
    wanted = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": "dev"})]
    return {canonicalize_name(r.name): r for r in wanted if r.name != "torch"}


def locked_versions() -> dict[str, str]:
    """The versions of requirements.lock for this Python."""
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()]
    fitting = [line for line in lines if line.marker is None or line.marker.evaluate()]
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in fitting}


def lower_bound(requirement: Requirement) -> str:
    return next(bound.version for bound in requirement.specifier if bound.operator == ">=")


def make_environment(name: str, torch: str) -> Path:
    """An environment with torch in .cache, kept for the next time; returns its interpreter."""
    folder = ROOT / ".cache" / name
    python = folder / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", str(folder)])
    has_torch = [str(python), "-c", "import importlib.metadata as m; m.version('torch')"]
    if subprocess.run(has_torch, capture_output=True, check=False).returncode:
        pip(python, torch)
    return python


def call(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode:
        raise MythosError(f"{' '.join(command[:6])} ...: exit code {result.returncode}")


def pip(python: Path, *arguments: str) -> None:
    call([str(python), "-m", "pip", "install", "-q", *arguments])


def install_project(python: Path) -> None:
    pip(python, "setuptools")
    pip(python, "--no-deps", "--no-build-isolation", "-e", ".")


def run_tests(python: Path, tests: list[str]) -> list[str]:
    """Run the tests, those marked slow left out; returns the names of those that failed, as pytest gives them."""
    cache = python.parents[1] / "pytest_cache"
    remembered = cache / "v" / "cache" / "lastfailed"
    remembered.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-o", f"cache_dir={cache}", *tests]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1):
        raise MythosError(f"pytest: exit code {code}")
    failed = list(json.loads(remembered.read_text(encoding="utf-8"))) if remembered.exists() else []
    if bool(failed) != bool(code):
        raise MythosError(f"pytest: exit code {code}, but {len(failed)} failed tests are on record")
    return failed


def try_transformers(arguments: Namespace) -> list[str]:
    """Run the export's tests on both ends of the allowed range; returns the names of the tests that broke."""
    requirement, locked = direct_requirements()["transformers"], locked_versions()
    tests = [str(path.relative_to(ROOT)) for pattern in EXPORT_TESTS for path in sorted(ROOT.glob(pattern))]
    broken = {}
    for version in (lower_bound(requirement), locked["transformers"]):
        python = make_environment(f"transformers-{version}", arguments.torch)
        held = {n: v for n, v in locked.items() if n not in OLDER_WITH_TRANSFORMERS}
        if version == locked["transformers"]:
            held = locked
        constraints = python.parents[1] / "constraints.txt"
        constraints.write_text("".join(f"{name}=={value}\n" for name, value in held.items()), encoding="utf-8")
        pip(python, "-c", str(constraints), f"transformers=={version}", *EXPORT_NEEDS)
        pip(python, "--no-deps", *EXPORT_COMPANIONS)  # which would take torch's place
        install_project(python)
        broken[version] = run_tests(python, tests)
    rows = [(version, "green" if not failed else listed(failed)) for version, failed in broken.items()]
    show(("transformers", "tests of the export"), rows)
    return [test for failed in broken.values() for test in failed]


def try_newest(arguments: Namespace) -> list[str]:
    """Run the default suite on the newest published versions; returns the names of the tests that broke."""
    python = make_environment("newest", arguments.torch)
    wanted, locked = direct_requirements(), locked_versions()
    lifted = [f"{name}{minimum(r)}" for name, r in wanted.items()]
    pip(python, "--upgrade", "--upgrade-strategy", "eager", *lifted)
    if arguments.without_dependencies:
        pip(python, "--no-deps", *arguments.without_dependencies)
    install_project(python)
    tried = installed_versions(python)
    failed = run_tests(python, [])
    newer = [name for name in wanted if Version(tried[name]) != Version(locked[name])]
    blamed = blame(python, failed, {name: (tried[name], locked[name]) for name in newer}) if failed else {}
    rows = []
    for name, requirement in sorted(wanted.items()):
        verdict = listed(blamed[name]) if blamed.get(name) else "green"
        version = tried[name] if name in newer else f"{tried[name]} (the locked one)"
        rows.append((name, str(requirement.specifier), version, verdict))
    show(("dependency", "bound", "tried", "result"), rows)
    left = [test for test in failed if not any(test in tests for tests in blamed.values())]
    if left:
        sys.stdout.write(f"broken, and by no dependency of this table alone: {listed(left)}\n")
    return failed


def minimum(requirement: Requirement) -> str:
    bounds = [str(bound) for bound in requirement.specifier if bound.operator == ">="]
    return ",".join(bounds)


def installed_versions(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listing = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {canonicalize_name(row["name"]): row["version"] for row in listing}


def blame(python: Path, failed: list[str], newer: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Put back one dependency at a time; those of the failed tests that then pass were broken by it."""
    blamed = {}
    for name, (tried, locked) in newer.items():
        pip(python, "--no-deps", f"{name}=={locked}")
        still = run_tests(python, failed)
        pip(python, "--no-deps", f"{name}=={tried}")
        blamed[name] = [test for test in failed if test not in still]
    return blamed


def listed(tests: list[str]) -> str:
    names = [re.sub(r"^.*::", "", test) for test in tests]
    return f"breaks {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def show(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    sys.stdout.write(plain_table(heads, rows) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
