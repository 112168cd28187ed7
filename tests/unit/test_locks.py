"""The locks hold what pyproject.toml asks for, and nothing that belongs to one machine."""

import re
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

LOCKS = ("requirements.lock", "requirements-docs.lock", "requirements-vllm.lock", "requirements-lm-eval.lock")
PYTHONS = ("3.11", "3.12", "3.13")
OF_A_MACHINE = re.compile(r"^(torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|pytorch-.*)$")
PINNED = re.compile(r"[a-z0-9-]+==[A-Za-z0-9.!+]+( ; [^/@\\]+)?")


def _lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_neither_torch_nor_an_index_nor_a_path(name: str) -> None:
    lines = _lines(name)
    assert len(lines) > 50
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    assert [line for line in lines if OF_A_MACHINE.match(Requirement(line).name)] == []


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple", "numpy @ file:///wheels/numpy.whl", "numpy==2.0 # via /tmp/setup.py",
        "-r other.txt", "numpy>=2", "./numpy.whl",
    ],
)  # fmt: skip
def test_what_belongs_to_a_machine_would_be_found(line: str) -> None:
    assert not PINNED.fullmatch(line)
    assert OF_A_MACHINE.match("nvidia-cublas-cu12")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_satisfies_every_requirement_but_torch(python: str) -> None:
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = [Requirement(line) for line in _lines("requirements.lock")]
    versions = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(here)
    }
    asked = [Requirement(line) for line in requires("mythos_ds") or []]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({**here, "extra": "dev"})]
    assert len(asked) > 15
    for one in asked:
        if one.name != "torch":
            assert one.specifier.contains(versions[canonicalize_name(one.name)]), one
    assert {"open-mythos", "pytest", "ruff", "mypy", "uv"} <= versions.keys()


def test_the_lock_of_the_site_satisfies_its_extra_and_agrees_with_the_other() -> None:
    pins, others = ({canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, _lines(name))}
                    for name in ("requirements-docs.lock", "requirements.lock"))  # fmt: skip
    asked = [Requirement(line) for line in requires("mythos_ds") or []]
    for one in asked:
        if one.marker is not None and one.marker.evaluate({"extra": "docs"}) and not one.marker.evaluate({"extra": ""}):
            assert one.specifier.contains(pins[canonicalize_name(one.name)].removeprefix("==")), one
    assert {name for name in pins.keys() & others.keys() if pins[name] != others[name]} == set()
    assert {"mkdocs", "mkdocs-material", "mkdocstrings-python"} <= pins.keys()


def test_what_is_patched_or_subclassed_has_an_upper_bound() -> None:
    bounded = ("torch", "transformers", "deepspeed", "megatron-core", "vllm", "pydantic", "datasets")
    asked = [Requirement(line) for line in requires("mythos_ds") or []]
    found = {one.name for one in asked if any(bound.operator in ("<", "<=") for bound in one.specifier)}
    assert set(bounded) <= found
