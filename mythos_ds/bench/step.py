"""Time of one optimizer step on DeepSpeed against plain torch, of a pipeline against none, or with recomputation
against without, on the same cores."""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_ds.cluster.local_processes import run_processes
from mythos_ds.config.loader import load_config
from mythos_ds.errors import LabError, OptionError

TIME_LIMIT_S = 900
AGAINST = {
    "torch": ["parallel.pp_size=1"],
    "unpipelined": ["parallel.pp_size=1"],
    "unrecomputed": ["parallel.activation_checkpointing=none"],
}
"""What a run is compared with, and what of its configuration is another there."""


def compare_steps(
    config: str, overrides: Sequence[str], *, processes: int, against: str, steps: int, repetitions: int
) -> dict[str, Any]:
    """Medians of the step's seconds by side, their ratio, and a pipeline's idle shares; both sides run in turn.

    against: "torch" (plain torch in one process of as many threads), "unpipelined" or "unrecomputed". Raises LabError
    where a side failed, OptionError where both would be alike.
    """
    parallel = load_config(config, overrides).config.parallel
    if against == "unrecomputed" and parallel.activation_checkpointing == "none":
        raise OptionError(
            f'--against: given {against}; allowed: with parallel.activation_checkpointing "layer" or "loop"'
        )
    medians: dict[str, list[float]] = {"deepspeed": [], against: []}
    idle: list[dict[str, float]] = []
    for _ in range(repetitions):
        for side in medians:
            own = [*overrides, *AGAINST.get(side, [])]
            timed = _run({"side": side, "config": config, "overrides": own, "processes": processes, "steps": steps})
            medians[side].append(statistics.median(timed["seconds"]))
            idle += timed["idle"]
    best = {side: min(values) for side, values in medians.items()}
    result: dict[str, Any] = {
        "config": config,
        "overrides": [*overrides],
        "processes": processes,
        "step_s": medians,
        f"ratio_deepspeed_to_{against}": best["deepspeed"] / best[against],
    }
    if idle:
        result["idle_share"] = {name: statistics.mean(step[name] for step in idle) for name in idle[0]}
    return result


def _run(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each timed step of one fresh run, and the idle shares of a pipeline's."""
    processes = 1 if case["side"] == "torch" else case["processes"]
    with tempfile.TemporaryDirectory() as folder:
        case_file, result = Path(folder) / "case.json", Path(folder) / "seconds.json"
        case_file.write_text(json.dumps(case), encoding="utf-8")
        command = [sys.executable, "-m", "mythos_ds.bench.step_worker", str(case_file), str(result)]
        # Both sides on the same cores.
        threads = str(case["processes"] // processes)
        variables = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "OMP_NUM_THREADS": threads}
        code = run_processes(command, processes, variables=variables, limit_s=TIME_LIMIT_S)
        if code:
            raise LabError(f"the {case['side']} side failed (exit code {code})", code="MDS901")
        return json.loads(result.read_text(encoding="utf-8"))
