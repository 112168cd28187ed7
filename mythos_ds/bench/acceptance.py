"""Runs acceptance checks one by one, each in processes of its own and within a time limit, and keeps a line of each.

A check is a function that measures numbers and says what they are held to. One that fails, crashes, hangs or takes the
GPU's context down ends alone: the others run all the same. No torch here: it belongs to the check's own process.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mythos_ds.config.error_messages import did_you_mean
from mythos_ds.errors import Coded, OptionError
from mythos_ds.provenance import git_commit, package_versions

RESULTS = "acceptance.jsonl"
DEVICES = ("cuda", "cpu")
CALL_LIMIT_S = 420.0
"""Time of one call in all, so that it fits into ten minutes with what a machine needs to get ready."""
_GRACE_S = 3.0
_POLL_S = 0.05
_MARK = "MYTHOS_ACCEPTANCE_CHECK"
"""Environment variable with a value of its own for each check: what a check leaves behind is found by it."""


@dataclass(frozen=True)
class AcceptanceCheck:
    """One check.

    Attributes:
        name: what `--only` takes.
        call: the group that it runs in, 1 to 3.
        shows: what holds when it passes, in one sentence.
        function: "module:function", called with a `Probe` in the check's own process.
        limit_s: seconds after which it is ended and has failed.
        needs_gpu: it is skipped without a GPU, for the reason given here; None: it runs anywhere.
    """

    name: str
    call: int
    shows: str
    function: str
    limit_s: float = 90.0
    needs_gpu: str | None = None


@dataclass
class AcceptanceResult:
    """What a check ended with; the fields of its line."""

    check: str
    call: int
    status: str
    reason: str = ""
    numbers: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""


def select(checks: Sequence[AcceptanceCheck], names: Sequence[str], calls: Sequence[int]) -> list[AcceptanceCheck]:
    """The checks of these names, or of these calls, or all. Raises OptionError naming every unknown name."""
    known = {check.name: check for check in checks}
    problems = [
        Coded(OptionError.code, f"--only: given {name!r}; allowed: {', '.join(known)}{did_you_mean(name, known)}")
        for name in names
        if name not in known
    ]
    if problems:
        raise OptionError(problems)
    if names and calls:
        raise OptionError("--only and --call are both given; allowed: one of them")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [check for check in checks if not calls or check.call in calls]


def run_checks(
    checks: Sequence[AcceptanceCheck], output: Path, *, device: str, root: Path, limit_s: float = CALL_LIMIT_S
) -> Iterator[AcceptanceResult]:
    """Run the checks in order; yields each result once its line is in `output`/acceptance.jsonl.

    Args:
        checks: what `select` found.
        output: a folder, made where it is not there; lines are added to those of former runs. What a check printed is
            in NAME.log.
        device: "cuda" or "cpu".
        root: the checkout, in which the checks' modules are imported.
        limit_s: seconds of each call in all; a check that cannot begin within them has failed. Four times these, and
            four times the checks' own limits, without a GPU.
    """
    output.mkdir(parents=True, exist_ok=True)
    versions, commit = package_versions(), git_commit()
    used: dict[int, float] = {}
    times = patience(device)
    for check in checks:
        left = times * limit_s - used.get(check.call, 0.0)
        started = time.monotonic()
        if check.needs_gpu is not None and device == "cpu":
            result = AcceptanceResult(
                check.name, check.call, "skip", f"needs a GPU: {check.needs_gpu}", device={"kind": "cpu"}
            )
        elif left <= 0:
            over = f"the {times * limit_s:.0f} s of call {check.call} were over"
            why = f"not begun: {over}; run it by --only {check.name}"
            result = AcceptanceResult(check.name, check.call, "fail", why, device={"kind": device})
        else:
            result = _run(check, output, device, root, min(times * check.limit_s, left))
        result.seconds = round(time.monotonic() - started, 2)
        used[check.call] = used.get(check.call, 0.0) + result.seconds
        result.date = datetime.now(UTC).isoformat(timespec="seconds")
        result.versions, result.commit = {**versions, **result.versions}, commit
        with (output / RESULTS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(vars(result)) + "\n")
        yield result


def patience(device: str) -> float:
    """What time limits are multiplied by: on a CPU, beside whatever else the machine does, time is no measure."""
    return 1.0 if device == "cuda" else 4.0


def read_results(files: Sequence[Path]) -> dict[str, AcceptanceResult]:
    """The last line of each check in these files, by name. Raises OptionError for a file that is none of ours."""
    found: dict[str, AcceptanceResult] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                result = AcceptanceResult(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise OptionError(f"{path}: line {number} is no result of an acceptance check: {error}") from None
            found[result.check] = result
    return found


def _run(check: AcceptanceCheck, output: Path, device: str, root: Path, limit_s: float) -> AcceptanceResult:
    """One check in a session of its own; nothing of it outlives the call."""
    token = secrets.token_hex(16)
    notes = output / f"{check.name}.measured"
    notes.unlink(missing_ok=True)
    environment = {
        **os.environ, _MARK: token, "DS_ACCELERATOR": device, "PYTHONUNBUFFERED": "1",
        "TORCH_EXTENSIONS_DIR": str((output / "torch_extensions").resolve()),
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", "1")
    # fp32 sums of matrix products in an order that does not vary; read when CUDA starts.
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    command = [sys.executable, "-m", "mythos_ds.bench.acceptance_worker", check.function, str(notes.resolve()), device]
    with (output / f"{check.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = _wait(process, limit_s)
        finally:
            _end(process, token)
    result = _result(check, notes, device, code, limit_s)
    notes.unlink(missing_ok=True)
    return result


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None past the limit."""
    deadline = time.monotonic() + limit_s
    while (code := process.poll()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return code


def _end(process: subprocess.Popen[bytes], token: str) -> None:
    """End what still runs of a check: its own session, then whatever else it started, in any session."""
    if process.poll() is None:
        _signal_session(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    _signal_session(process.pid, signal.SIGKILL)
    process.wait()
    mark = f"{_MARK}={token}".encode()
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in place.read_bytes().split(b"\0"):
                os.kill(int(place.parent.name), signal.SIGKILL)


def _signal_session(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _result(check: AcceptanceCheck, notes: Path, device: str, code: int | None, limit_s: float) -> AcceptanceResult:
    """What the check noted, and how it ended, as a result."""
    result = AcceptanceResult(check.name, check.call, "fail", device={"kind": device})
    ended: dict[str, Any] = {}
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
    for line in lines:
        with suppress(ValueError):  # the last one of a process that was ended while it wrote
            entry = json.loads(line)
            result.numbers += [entry["number"]] if "number" in entry else []
            result.notes |= entry.get("note", {})
            result.device |= entry.get("device", {})
            result.versions |= entry.get("versions", {})
            ended = entry.get("ended", ended)
    broken = [number for number in result.numbers if not number["ok"]]
    if code is None:
        result.reason = f"not done after {limit_s:.0f} s"
    elif not ended:
        result.reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    elif ended["how"] == "skip" and not broken:
        result.status, result.reason = "skip", ended["why"]
    elif ended["how"] == "error":
        result.reason = ended["why"]
    elif not result.numbers:
        result.reason = "measured nothing"
    elif not broken:
        result.status = "pass"
    result.reason = "; ".join(
        [*(_broken_text(number) for number in broken), *([result.reason] if result.reason else [])]
    )
    return result


def _broken_text(number: dict[str, Any]) -> str:
    return f"{number['name']}: {number_text(number)}, {bar_text(number)}"


def number_text(number: dict[str, Any]) -> str:
    """A measured number with its unit."""
    value = number["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return f"{shown} {number['unit']}".strip()


def bar_text(number: dict[str, Any]) -> str:
    """What a number is held to; nothing for one that is only reported."""
    words = {"at_most": "at most", "at_least": "at least", "equals": "must be"}
    return " and ".join(f"{word} {number[bar]:g}" for bar, word in words.items() if number[bar] is not None)


class SkippedError(Exception):
    """Raised by `Probe.skip`."""


class Probe:
    """What a check writes its measurements to; `write` takes each as it comes, so that none is lost in a crash.

    Attributes:
        device_type: "cuda" or "cpu".
        folder: for files that a check leaves beside its results.
    """

    def __init__(self, device: str, folder: Path, write: Callable[[dict[str, Any]], None]):
        self.device_type, self.folder, self._write = device, folder, write

    @property
    def on_gpu(self) -> bool:
        """Whether sizes, kernels and bars are those of a GPU."""
        return self.device_type == "cuda"

    def number(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        equals: float | None = None,
    ) -> None:
        """Note a measured number, and what it is held to; NaN passes no bar."""
        ok = at_most is None or value <= at_most
        ok = ok and (at_least is None or value >= at_least) and (equals is None or value == equals)
        bars = {"at_most": at_most, "at_least": at_least, "equals": equals}
        self._write({"number": {"name": name, "value": +value, "unit": unit, **bars, "ok": bool(ok)}})

    def note(self, name: str, value: Any) -> None:
        """Note a fact that is held to nothing: a name, a list."""
        self._write({"note": {name: value}})

    def skip(self, reason: str) -> None:
        """End the check as skipped, for this reason."""
        raise SkippedError(reason)
