"""Runs a function on several ranks that share one GPU (or the CPU), connected by the staged back end."""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from mythos_ds.bench.acceptance import Probe, patience
from mythos_ds.cluster.local_processes import TIME_LIMIT_EXIT_CODE, run_processes
from tests.gpu import order_log, staged_backend

TIMEOUT_S = 120.0
"""Of a collective."""


class RanksFailedError(RuntimeError):
    """A rank failed, or did not end; the message has the end of what it printed."""


def on_ranks(function: str, count: int, *, device: str, limit_s: float, **arguments: Any) -> list[Any]:
    """Calls "module:function" with `arguments` on `count` ranks; their results, by rank, as JSON has them.

    Raises RanksFailedError with the end of the logs where a rank failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call.json").write_text(json.dumps({"function": function, "arguments": arguments}))
        command = [sys.executable, "-m", "tests.gpu.ranks", str(folder)]
        # gloo would look its own name up, which a machine without a network may not know.
        variables = {"DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        code = run_processes(command, count, variables=variables, logs=folder, limit_s=patience(device) * limit_s)
        if code:
            logs = [f"--- rank {rank}\n{(folder / f'rank_{rank}.log').read_text(errors='replace')[-3000:]}"
                    for rank in range(count)]  # fmt: skip
            sys.stderr.write("\n".join(logs) + "\n")
            how = "did not end" if code == TIME_LIMIT_EXIT_CODE else f"failed with exit code {code}"
            raise RanksFailedError(f"{function} on {count} ranks {how}")
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(count)]


def check_order(probe: Probe, logs: list[order_log.Log], name: str) -> None:
    """Hold the ranks' operations to one order, and to the device."""
    different = order_log.differences(logs)
    if different:
        probe.note(f"{name}: differences", different[:5])
    probe.number(f"{name}: operations that differ between ranks of a group", len(different), equals=0)
    probe.number(f"{name}: operations that could never begin on NCCL", order_log.stuck(logs), equals=0)
    probe.number(f"{name}: operations of a rank", len(logs[0]), at_least=1)
    # Bytes are pickled objects, which torch sends from the host where the back end takes tensors from there.
    tensors = [entry for log in logs for entry in log if entry["dtype"] != "torch.uint8" and entry["numel"] > 1024]
    elsewhere = [entry for entry in tensors if entry["device"] != probe.device_type]
    probe.number(f"{name}: larger tensors that are not on the device", len(elsewhere), equals=0)


def _main(folder: Path) -> None:
    """One rank. To DeepSpeed and to the project each is the only process of its node, so all take GPU 0."""
    rank = os.environ["RANK"]
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", LOCAL_SIZE="1")
    try:
        call = json.loads((folder / "call.json").read_text())
        staged_backend.start(folder / "store", TIMEOUT_S)
        module, name = call["function"].split(":")
        result = getattr(importlib.import_module(module), name)(**call["arguments"])
        (folder / f"result_{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that waits for the others would hang


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
