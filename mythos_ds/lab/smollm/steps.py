"""The project's own commands as the steps of a longer work: each in a process, logged, and not repeated when done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.errors import LabError
from mythos_ds.io import write_json
from mythos_ds.log import get_logger

_SHOWN_LINES = 15
_STOP_SECONDS = 120.0

_logger = get_logger(__name__)


class Steps:
    """Runs `mythos-ds` commands, which keep what they make in `work`; marks and logs lie in work/steps."""

    def __init__(self, work: Path):
        self.folder = work / "steps"
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_done(self, name: str) -> bool:
        """Whether the step of this name came to its end."""
        return self._mark(name).is_file()

    def run(self, name: str, arguments: Sequence[object], *, threads: int) -> float:
        """Run one command, unless it is done; the seconds that it took. Raises LabError where it fails, with the end of
        its log, and where the step of this name was another command."""
        given = [str(argument) for argument in arguments]
        mark = self._mark(name)
        if mark.is_file():
            done = json.loads(mark.read_text(encoding="utf-8"))
            if done["arguments"] != given:
                raise LabError(f"{mark}: was made with other settings; remove {self.folder.parent} to begin anew")
            return float(done["seconds"])
        _logger.info("%s: mythos-ds %s", name, " ".join(given[:6]) + (" ..." if len(given) > 6 else ""))
        started = time.monotonic()
        log = self.folder / f"{name}.log"
        code = _run([sys.executable, "-m", "mythos_ds", *given], log, threads)
        if code != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
            raise LabError("\n".join([f"{name}: ended with exit code {code}; the end of {log}:", *tail]), code="MDS901")
        seconds = time.monotonic() - started
        write_json(mark, {"arguments": given, "seconds": seconds})
        return seconds

    def _mark(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _run(command: list[str], log: Path, threads: int) -> int:
    # Threads that wait actively take the cores from each other where other work runs.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as output:
        # A session of its own: Ctrl-C reaches this process, which then stops the command in order.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)  # training saves where it is
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
