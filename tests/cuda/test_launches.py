"""How many kernels a layer of 1b launches in one loop, and how many bytes they touch: budgets that only fall.

Operators outside regions are counted on fake tensors of device "cuda"; a region's kernels are those that the inductor
schedules for it. Recomputed loops, one document per sequence, and no statistics beside the counts of experts.
"""

import pickle
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.test_pretended_gpu import COMPILER, TIMEOUT_S, library  # noqa: F401  the fixture
from tests.helpers.paths import ROOT
from tests.helpers.region_calls import Call
from tests.helpers.region_costs import Cost, cost_of_call

OUTSIDE = {"forward": 17, "backward": 77}
"""Launches outside regions, backward with the recompute."""
LAUNCHES = {"forward": 60, "backward": 142}
GIGABYTES = {"forward": 5.0, "backward": 16.6}
"""As reached; without regions they were 159 and 375, 10.7 and 22.3."""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the pretended GPU with"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own"),
]


@pytest.fixture(scope="module")
def found(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """What one more loop of 1b takes by layer: operators outside regions, and calls of regions."""
    output = tmp_path_factory.mktemp("launches") / "found.pickle"
    command = [sys.executable, "-m", "tests.cuda.launches_on_pretended_gpu", str(library), "1b", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = pickle.loads(output.read_bytes())
    return result


@pytest.mark.parametrize("direction", LAUNCHES)
def test_operators_outside_regions(direction: str, found: dict[str, Any]) -> None:
    own = found[direction]
    assert own["launches"] <= OUTSIDE[direction], own["names"]
    calls = sum(found["forward"]["forward"].values())
    assert calls >= 14, "regions are called"


@pytest.mark.slow
def test_budget_of_a_layer(found: dict[str, Any]) -> None:
    """With the regions' own kernels; prints what each takes."""
    for direction, limit in LAUNCHES.items():
        own = found[direction]
        per_region: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        launches, gigabytes = own["launches"], own["bytes"] / 1e9
        for kind in ("forward", "backward"):
            for call, times in own[kind].items():
                cost: Cost = getattr(_cost(call), kind)
                row = per_region[f"{call.name}, {kind}"]
                for place, value in enumerate((cost.kernels, cost.calls, cost.bytes / 1e9)):
                    row[place] += times * value
                launches += times * cost.launches
                gigabytes += times * cost.bytes / 1e9
        lines = [f"{name}: {k:.2f} kernels, {c:.2f} calls, {b:.2f} GB" for name, (k, c, b) in per_region.items()]
        lines.append(f"outside: {own['launches']:.2f} launches, {own['bytes'] / 1e9:.2f} GB: {own['names']}")
        report = "\n".join([f"{direction}: {launches:.1f} launches, {gigabytes:.2f} GB", *lines])
        sys.stdout.write(report + "\n")
        assert launches <= limit, report
        assert gigabytes <= GIGABYTES[direction], report


_COSTS: dict[Call, Any] = {}


def _cost(call: Call) -> Any:
    if call not in _COSTS:
        _COSTS[call] = cost_of_call(call)
    return _COSTS[call]
