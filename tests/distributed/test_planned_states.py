"""What the planner and the rehearsal say of a rank is what a real engine's rank holds."""

import json
import subprocess
import sys
from typing import Any

import pytest

from mythos_ds.bench.calibration import EXCHANGES, measure_waits
from tests.helpers.distributed import run_distributed
from tests.helpers.paths import ROOT

CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"ep": 2, "stage": 3},
        {"ep": 1, "stage": 3, "dtype": "bfloat16"},
        {"ep": 2, "stage": 3, "optimizer": "sgd"},
    ],
    4: [
        {"ep": 2, "stage": 3, "dtype": "bfloat16"},
        {"ep": 4, "stage": 3},
        {"ep": 2, "stage": 3, "pp": 2, "model": {"tie_embeddings": True}},
    ],
    8: [{"ep": 4, "stage": 3}, {"ep": 8, "stage": 3}, {"ep": 2, "stage": 3, "pp": 2, "accumulation": 2}],
}


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_states_are_counted_to_the_byte(world_size):
    cases = [
        {**case, "accumulation": 1} if world_size == 8 and "accumulation" not in case else case
        for case in CASES[world_size]
    ]
    for found in run_distributed("tests.distributed.planning_cases:work", world_size, 300.0, cases=cases):
        for case, own in zip(cases, found, strict=True):
            # SGD keeps nothing, and Adam's state appears with the first step.
            kept = {**own["kept"], "optimizer": own["planned"]["optimizer"]}
            assert kept == own["planned"], case


def test_rows_leave_and_are_waited_for_in_the_planned_order() -> None:
    """On four processes, two pretended nodes, in two lanes: an event out of order ends the run."""
    (case,) = (case for case in EXCHANGES if case.name == "EP 4 over two nodes, per node, two lanes")
    waits = measure_waits(case)
    assert 1 < waits.predicted < 1.5, "lanes hide more than half"
    assert waits.measured > 1


def rehearse(rank: int, *settings: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools" / "rehearse.py"), "--config", "1t.json", "--rank", str(rank)]
    command.append("--json")
    result = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("rank", "group", "experts"), [(0, 0, [0, 3]), (777, 768, [36, 39]), (1023, 768, [1020, 1023])]
)
def test_any_rank_of_1024_can_be_rehearsed(rank, group, experts):
    found = rehearse(rank)
    assert found["expert_group"] == list(range(group, group + 256))
    assert found["experts"] == experts
    assert found["expert_copies"] == [rank % 256 + 256 * i for i in range(4)]
    assert (found["node"], found["local_rank"]) == divmod(rank, 8)
    assert found["state_bytes"]["masters"] * 1024 / 4 == pytest.approx(992.5e9, rel=1e-3)


def test_a_pipeline_is_rehearsed_with_its_schedule():
    found = rehearse(300, "parallel.pp_size=4", "parallel.ep_size=256", "--step", "3")
    assert (found["stage"], found["stage_ranks"], found["layers"]["recurrent"]) == (1, [256, 511], [2, 3])
    visits = found["n_loops"] + 2
    assert found["actions"]["FORWARD"] == found["actions"]["FULL_BACKWARD"] == visits * found["micro_batches"]
    assert found["samples_of_the_step"] == [3 * 4096, 4 * 4096 - 1]


def test_a_rank_that_does_not_exist_is_one_message():
    command = [sys.executable, str(ROOT / "tools" / "rehearse.py"), "--config", "1t.json", "--rank", "1024"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "0 .. 1023; nearest: 1023" in result.stderr
