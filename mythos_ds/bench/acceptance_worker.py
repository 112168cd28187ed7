"""The process of one acceptance check; started by bench/acceptance.py with "module:function", a file and the device."""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mythos_ds.bench.acceptance import Probe, SkippedError

_QUERY = "clocks.sm,clocks.mem,clocks_event_reasons.active,temperature.gpu,power.draw"
_QUERY_LIMIT_S = 10


def main(function: str, file: str, device: str) -> None:
    """Run the check; every measurement is in `file` before the next begins."""
    with Path(file).open("a", encoding="utf-8", buffering=1) as lines:

        def write(entry: dict[str, Any]) -> None:
            lines.write(json.dumps(entry) + "\n")

        signal.signal(signal.SIGTERM, _leave)
        write({"device": machine(device), "versions": other_versions(device)})
        try:
            module, name = function.split(":")
            getattr(importlib.import_module(module), name)(Probe(device, Path(file).parent, write))
            ended = {"how": "done", "why": ""}
        except SkippedError as skipped:
            ended = {"how": "skip", "why": str(skipped)}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or ["no message"])[0][:300]
            ended = {"how": "error", "why": f"{type(error).__name__}: {first}"}
        if device == "cuda":
            write({"device": {"clocks_after": clocks()}})
        write({"ended": ended})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process group's threads now and then abort the interpreter's own way out


def _leave(number: int, frame: FrameType | None) -> None:
    """Past the time limit: contexts that end other processes are left in order."""
    raise SystemExit(128 + number)


def machine(device: str) -> dict[str, Any]:
    """The device as its driver names it, its size, and its clocks now."""
    if device == "cpu":
        return {"kind": "cpu", "name": f"{os.cpu_count()} cores"}
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda",
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "clocks_before": clocks(),
    }


def clocks() -> str | None:
    """Clocks, throttling, temperature and power of GPU 0 as its tool prints them; None without the tool."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def other_versions(device: str) -> dict[str, Any]:
    """Versions that matter on a GPU alone: NCCL's and Triton's, None where there is none."""
    if device == "cpu":
        return {}
    import torch

    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    triton: str | None = None
    with suppress(ImportError):
        triton = str(importlib.import_module("triton").__version__)
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None, "triton": triton}


if __name__ == "__main__":
    main(*sys.argv[1:])
