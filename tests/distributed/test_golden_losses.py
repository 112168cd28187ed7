"""Losses and gradient norms of 20 steps of every preset, as recorded in tests/golden/losses.json.

A change that is meant to alter them records them anew (python -m tests.golden.write) and says so in CHANGELOG.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.runs import LOSSES, OTHERS, STEPS, digest, names, record, rounding
from tests.golden.tokens import TOKENS, write_tokens
from tests.helpers.paths import ROOT

DEFAULT = ("1t", "tiny")
SAME = 1e-5
OTHER = {"loss": 1e-3, "grad_norm": 3e-2}
GROWN = {"loss": 3e-2, "grad_norm": 2.0}
"""Relative tolerances: where numbers are rounded as on a machine that recorded, and elsewhere, which is another build
of torch or a kind of processor that is not recorded (its library of matrix products adds in another order). A last bit
of the first step grows by choices between nearly equal experts: in 10 steps to 6e-5 of the loss and 5e-4 of the norm,
in 20 to 1e-2 and 0.7, between three kinds of processors."""
FIRST, GROWS = 2, 10
"""Steps in which nothing has grown yet, SAME everywhere with the version of torch that recorded; and those of OTHER."""
ROUNDING = 1e-12
"""Of the first step: below what another order of additions changes (5e-11 of 50b's norm between two processors)."""
MAX_TOKEN_BYTES = 200_000


def recorded() -> dict[str, Any]:
    return json.loads(LOSSES.read_text())


def version(torch_build: str) -> str:
    """2.13.0 of 2.13.0+cpu."""
    return torch_build.partition("+")[0]


@pytest.mark.parametrize(
    "preset", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names()]
)
def test_a_preset_trains_as_recorded(preset: str, tmp_path: Path) -> None:
    expected = recorded()
    same_version = version(torch.__version__) == version(expected["torch"])
    own = expected.get(OTHERS, {}).get(rounding(), {}).get(preset)
    runs, found = own or expected["runs"][preset], record(preset, tmp_path)
    assert found.keys() == runs.keys()
    same_rounding = same_version and (
        own is not None or all(found[name][0] == pytest.approx(runs[name][0], rel=ROUNDING) for name in runs)
    )
    for name, values in runs.items():
        if same_version:
            assert found[name][:FIRST] == pytest.approx(values[:FIRST], rel=SAME), f"{preset}: {name} at the start"
        if same_rounding:
            assert found[name] == pytest.approx(values, rel=SAME), f"{preset}: {name}"
        else:
            require_alike(found[name], values, name, preset)


def require_alike(found: list[float], values: list[float], name: str, preset: str) -> None:
    """The numbers of the same computation that is rounded otherwise."""
    assert found[:GROWS] == pytest.approx(values[:GROWS], rel=OTHER[name]), f"{preset}: {name}"
    assert found[GROWS:] == pytest.approx(values[GROWS:], rel=GROWN[name]), f"{preset}: {name}, when it has grown"


def test_other_processors_differ_by_rounding_only() -> None:
    """What is recorded beside the runs is the same computation."""
    recordings = recorded()
    for others in recordings.get(OTHERS, {}).values():
        for preset, metrics in others.items():
            for name, values in metrics.items():
                first = recordings["runs"][preset][name]
                assert values[:FIRST] == pytest.approx(first[:FIRST], rel=SAME), f"{preset}: {name} at the start"
                require_alike(values, first, name, preset)


def test_every_preset_is_recorded_with_the_torch_that_is_installed_by_default() -> None:
    expected = recorded()
    assert sorted(expected["runs"]) == names()
    assert f"TORCH ?= torch=={version(expected['torch'])}\n" in (ROOT / "Makefile").read_text()
    for preset, metrics in expected["runs"].items():
        assert all(len(values) == STEPS for values in metrics.values()), preset
        assert metrics["loss"][-1] < 0.9 * metrics["loss"][0], f"{preset}: learns"


def test_recorded_numbers_have_an_entry_in_the_changelog() -> None:
    """The newest that is named must be what is recorded, so that no file of numbers changes in silence."""
    text = (ROOT / "CHANGELOG.md").read_text()
    entries = [" ".join(entry.split()) for entry in re.split(r"^- ", text, flags=re.M)]
    named = [(found.group(1), entry) for entry in entries for found in re.finditer(r"[Gg]olden losses `(\w+)`", entry)]
    assert named, "no entry"
    label, entry = named[0]
    assert label == digest(recorded()["runs"]), (
        "new numbers need an entry: python -m tests.golden.write prints its label"
    )
    assert "**N**" in entry


def test_the_tokens_are_those_of_the_script(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    sizes = []
    for suffix in (".bin", ".idx", ".json"):
        committed = TOKENS.with_suffix(suffix).read_bytes()
        sizes.append(len(committed))
        assert (tmp_path / "tokens").with_suffix(suffix).read_bytes() == committed, suffix
    assert sum(sizes) <= MAX_TOKEN_BYTES
