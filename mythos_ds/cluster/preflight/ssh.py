"""Asks every host of a hostfile for its facts by ssh, before anything is launched. No torch."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mythos_ds.cluster.hostfile import Line
from mythos_ds.cluster.preflight.host_facts import HostFacts
from mythos_ds.cluster.preflight.report import Check, places

CONNECT_S = 10
_AT_ONCE = 64
_CARRIED = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")


def ask(lines: Sequence[Line], script: Path, arguments: Sequence[str], limit_s: float) -> tuple[list[HostFacts], Check]:
    """The facts of the hosts that answer, each with the least "offset" its clock must have, and whether all did.

    Runs `script` with `arguments` on every host in the same folder with the same Python, as DeepSpeed's launcher does.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(lambda line: _ask_one(line.host, script, arguments, limit_s), lines))
    facts = [answer for answer in answers if not isinstance(answer, str)]
    silent = [answer for answer in answers if isinstance(answer, str)]
    if silent:
        return facts, Check("hosts", False, places(silent))
    return facts, Check("hosts", True, f"{len(lines)} reached by ssh, with {sys.executable}")


def _ask_one(host: str, script: Path, arguments: Sequence[str], limit_s: float) -> HostFacts | str:
    variables = [f"{name}={os.environ[name]}" for name in _CARRIED if name in os.environ]
    command = shlex.join(["env", *variables, sys.executable, str(script), *arguments])
    remote = f"cd {shlex.quote(os.getcwd())} && {command}"
    # Neither a password nor an unknown host key is asked for: DeepSpeed's launcher could not answer either.
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", host, remote]
    started = time.time()
    try:
        done = subprocess.run(
            ssh, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{host}: no answer within {limit_s:g} s"
    except FileNotFoundError:
        return f"{host}: no ssh program here"
    ended = time.time()
    if done.returncode == 255:
        return f"{host}: not reached by ssh ({_last_line(done.stderr)})"
    try:
        facts: HostFacts = json.loads(done.stdout.splitlines()[-1])
        seen = float(facts["time"])
    except (IndexError, ValueError, KeyError, TypeError):
        return f"{host}: {_last_line(done.stderr or done.stdout)} (exit code {done.returncode})"
    # The host looked at its clock between the two times here: only what lies outside is known to be wrong.
    offset = min(0.0, seen - started) + max(0.0, seen - ended)
    return {**facts, "host": host, "offset": offset}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
