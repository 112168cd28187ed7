"""The command `mythos-ds VERB ...`, also `python -m mythos_ds VERB ...`: runs a main of tools/ or launch/.

Verbs are the names of their files. Nothing is imported but the main that is asked for.
"""

import ast
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import mythos_ds
from mythos_ds import guard
from mythos_ds.environment import wait_passively
from mythos_ds.errors import MythosError
from mythos_ds.log import quiet_without_gpu

COMMAND = "mythos-ds"
_PACKAGES = ("mythos_ds.launch", "mythos_ds.tools")
_LEFT_OUT = ("_checkpoint", "_checkpoints")
_LOCAL_RANK = ("--local_rank", "--local-rank")
_USAGE = f"usage: {COMMAND} VERB ...    ({COMMAND} VERB --help says more)"
_USER_ERROR_EXIT_CODE = 2
GROUPS = {
    "train": ("pretrain", "init-config", "train-gate", "finished"),
    "data": ("train-tokenizer", "prepare-data", "inspect-data", "prepare-index", "build-corpus"),
    "models": (
        "generate", "evaluate", "loop-report", "inspect", "verify", "merge", "convert", "average", "reshard",
        "loop-from-dense",
    ),
    "cluster": (
        "plan", "rehearse", "plot-pipeline", "render-launch", "preflight", "gpu-acceptance", "calibrate", "capacity",
        "serve-vllm",
    ),
    "studies": ("lab", "loop-smollm", "bench-step", "bench-side-by-side", "bench-lanes", "bench-data"),
    "upkeep": ("env", "config-schema", "preset-table", "train-tiny", "test-environments"),
}  # fmt: skip
"""The verbs as the help lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that `argv` names with the arguments after it; the exit code, unless the verb ends the process."""
    return guard.guarded(COMMAND, lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    before, rest = _split(argv)
    if not rest or rest[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0 if rest else _USER_ERROR_EXIT_CODE
    if rest[0] == "--version":
        sys.stdout.write(f"{COMMAND} {mythos_ds.__version__}\n")
        return 0
    found = verbs()
    _require_installed(found)
    if rest[0] not in found:
        sys.stderr.write(f"{COMMAND}: given {rest[0]!r}; allowed: {', '.join(found)}{_nearest(rest[0], found)}\n")
        return _USER_ERROR_EXIT_CODE
    # The verb's usage line begins with this name, not with the path of its file.
    sys.argv = [f"{COMMAND} {rest[0]}", *rest[1:], *before]
    guard.interrupt_at_once(sys.argv[0])
    wait_passively(os.environ)
    quiet_without_gpu()
    runpy.run_module(found[rest[0]], run_name="__main__")
    return 0


def verbs() -> dict[str, str]:
    """The module of each verb, by name."""
    found = {}
    for package in _PACKAGES:
        for path in _files(package):
            name = path.stem
            for ending in _LEFT_OUT:
                name = name.removesuffix(ending)
            found[name.replace("_", "-")] = f"{package}.{path.stem}"
    return dict(sorted(found.items()))


def _require_installed(found: dict[str, str]) -> None:
    """Raises MythosError where a checkout's package is imported without being installed: it has no mains."""
    if not found:
        raise MythosError(
            f"mythos_ds is not installed in {sys.executable}, so there are no commands; in the checkout: pip install "
            "-e . (or, where `make setup` has made .venv: source .venv/bin/activate)",
            code="MDS780",
        )


def help_text() -> str:
    """Every verb with a line about it, group by group."""
    modules = verbs()
    _require_installed(modules)
    width = max(map(len, modules))
    lines = [_USAGE]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {_about(modules[name])}" for name in names)]
    return "\n".join([*lines, ""])


def _about(module: str) -> str:
    """The first line of a main's docstring."""
    package, _, stem = module.rpartition(".")
    path = next(path for path in _files(package) if path.stem == stem)
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _files(package: str) -> list[Path]:
    """The mains of a package."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return sorted(path for folder in folders for path in Path(folder).glob("[!_]*.py"))


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What DeepSpeed's launcher puts before the verb, and the rest."""
    before: list[str] = []
    rest = list(argv)
    while rest and rest[0].partition("=")[0] in _LOCAL_RANK:
        count = 1 if "=" in rest[0] else 2
        before, rest = before + rest[:count], rest[count:]
    return before, rest


def _nearest(given: str, found: dict[str, str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(given.removesuffix(".py").replace("_", "-"), found, 1, 0.5)
    return f"; nearest: {near[0]}" if near else ""


if __name__ == "__main__":
    sys.exit(main())
