"""A checkpoint of one layout goes on in another: every weight, moment and buffer bit for bit, and the same losses."""

from pathlib import Path
from typing import Any

import pytest

from mythos_ds.checkpoint.portable import write_portable
from tests.distributed.reshard_cases import compare
from tests.helpers.distributed import run_distributed

TIMEOUT_S = 400.0
WORK = "tests.distributed.reshard_cases:work"
RING = {"pp": 2, "accumulation": 2}
TAG = "step_00000003"
SOURCES: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2, "stage": 3},
    "bf16": {"ep": 2, "stage": 3, "dtype": "bfloat16"},
    "whole": {"ep": 1, "stage": 0, "dtype": "bfloat16"},
    "muon": {"ep": 2, "stage": 3, "training": {"optimizer": "muon", "muon_lr": 0.02, "grad_clip": 0.0}},
    "sgd": {"ep": 2, "stage": 2, "optimizer": "sgd"},
    "ring": {"ep": 2, "stage": 3, **RING, "model": {"tie_embeddings": True}},
}
"""Layouts that write, on four processes. Rings come last: their stages leave the processes with unlike counters of
DeepSpeed's parameter numbers, which it compares between ranks."""
QUICK = ("ep2", "bf16", "ring")
"""Those of the default suite."""
Written = tuple[Path, dict[str, dict[str, Any]]]
"""Where the checkpoints lie, and what was seen when each was written, by source."""


def _with(source: str, **layout: Any) -> dict[str, Any]:
    kept = {key: value for key, value in SOURCES[source].items() if key in ("model", "dtype", "training", "optimizer")}
    return {**kept, **layout}


Target = tuple[str, int, dict[str, Any]]
"""A source, and the processes and the layout that go on from it."""
QUICK_TARGETS: list[Target] = [
    ("ep2", 4, _with("ep2", ep=4, stage=3)),
    ("ep2", 2, _with("ep2", ep=2, stage=2)),
    ("ep2", 1, _with("ep2", ep=1, stage=0)),
    ("ring", 1, _with("ring", ep=1, stage=2)),
    ("bf16", 2, _with("bf16", ep=1, stage=3)),
    ("ep2", 4, _with("ep2", ep=2, stage=3, **RING)),
]
TARGETS: list[Target] = [
    ("ep2", 4, _with("ep2", ep=1, stage=3)),
    ("ep2", 4, _with("ep2", ep=2, stage=1)),
    ("ep2", 2, _with("ep2", ep=2, stage=3)),
    ("ep2", 1, _with("ep2", ep=1, stage=1)),
    ("ring", 4, _with("ring", ep=4, stage=3)),
    ("bf16", 1, _with("bf16", ep=1, stage=1)),
    ("bf16", 1, _with("bf16", ep=1, stage=0)),
    ("whole", 2, _with("whole", ep=1, stage=3)),
    ("muon", 2, _with("muon", ep=1, stage=3)),
    ("sgd", 2, _with("sgd", ep=2, stage=3)),
    *QUICK_TARGETS,
]
"""The ring is last here too."""


@pytest.fixture(
    scope="module", params=[QUICK, pytest.param(tuple(SOURCES), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("written")
    tasks = [{"case": SOURCES[name], "to": str(root / name)} for name in request.param]
    results = run_distributed(WORK, 4, TIMEOUT_S, tasks=tasks)
    return root, dict(zip(request.param, results[0], strict=True))


def test_what_is_merged_is_what_the_engine_holds(written):
    for name, found in written[1].items():
        assert found["different"] == [], name


@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_another_layout_goes_on(world_size, written, tmp_path):
    root, sources = written
    targets = TARGETS if len(sources) == len(SOURCES) else QUICK_TARGETS
    chosen = [(name, case) for name, size, case in targets if size == world_size]
    tasks = [
        {"case": case, "from": str(root / name / TAG), "again": str(tmp_path / str(number))}
        for number, (name, case) in enumerate(chosen)
    ]
    results = run_distributed(WORK, world_size, TIMEOUT_S, tasks=tasks)
    for number, (name, case) in enumerate(chosen):
        found = results[0][number]
        assert found["different"] == [], (name, case)
        assert found["global_steps"] == 6
        tolerance = 2e-3 if case.get("dtype") == "bfloat16" else 5e-6
        for loss, expected in zip(found["losses"], sources[name]["losses"], strict=True):
            assert abs(loss / expected - 1) <= tolerance, (name, case, found["losses"], sources[name]["losses"])


def test_portable_and_back_is_bit_equal(written, tmp_path):
    root, sources = written
    for name in sources:
        portable = write_portable(root / name / TAG, tmp_path / name, max_file_bytes=20_000)
        assert compare(root / name / TAG, portable) == []
    case = _with("ep2", ep=2, stage=3)
    task = {"case": case, "from": str(tmp_path / "ep2" / TAG), "again": str(tmp_path / "again")}
    (found,) = run_distributed(WORK, 2, TIMEOUT_S, tasks=[task])[0]
    assert found["different"] == []
    assert compare(tmp_path / "ep2" / TAG, write_portable(tmp_path / "again" / TAG, tmp_path / "back")) == []
    for loss, expected in zip(found["losses"], sources["ep2"]["losses"], strict=True):
        assert abs(loss / expected - 1) <= 5e-6
