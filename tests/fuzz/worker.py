"""Runs cases in a process that lives long: everything is imported once, and a case has a folder, five seconds and a
gigabyte."""

import contextlib
import os
import random
import resource
import shutil
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mythos_ds import guard
from mythos_ds.errors import MythosError
from tests.fuzz.mutators import Mutation
from tests.fuzz.targets import TARGETS, Case, Ended
from tests.helpers.time_limit import TooSlowError, at_most

LIMIT_S = 5.0
MEMORY_BYTES = 1 << 30
USER_ERROR = 2


@dataclass(frozen=True)
class Verdict:
    """How a case ended. `fault`: what is wrong with that, None where it counts as handled."""

    target: str
    number: int
    how: str
    fault: str | None = None


def run_case(artefacts: Path, work: Path, target: str, number: int, seed: int) -> Verdict:
    """Try one case; its folder below `work` is gone afterwards."""
    whole = result_of_whole(artefacts, work, target)
    root = work / f"{target}-{number}"
    try:
        return _tried(artefacts, root, target, number, seed, whole)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@cache
def result_of_whole(artefacts: Path, work: Path, target: str) -> Any:
    """The result of undamaged input; kept, and asked for before any worker is made."""
    root = work / f"{target}-whole"
    case = _prepared(artefacts, root, target, random.Random(0))
    case.whole = True
    result = TARGETS[target].run(case)[1]
    shutil.rmtree(root)
    return result


def _prepared(artefacts: Path, root: Path, target: str, generator: random.Random) -> Case:
    (root / "out").mkdir(parents=True)
    for name in TARGETS[target].needs:
        copy = shutil.copytree if (artefacts / name).is_dir() else shutil.copyfile
        copy(artefacts / name, root / name)
    return Case(root, generator, root / "canary")


def _tried(artefacts: Path, root: Path, target: str, number: int, seed: int, whole: Any) -> Verdict:
    case = _prepared(artefacts, root, target, random.Random(f"{seed}:{target}:{number}"))
    mutation, fault = Mutation("?"), None
    _forget_peak()
    before = _peak()
    os.chdir(root / "out")
    try:
        with at_most(LIMIT_S, target):
            mutation, found = TARGETS[target].run(case)
        how = "0"
        if not TARGETS[target].same(whole, found, mutation):
            fault = f"exit code 0 with another result: {str(found)[:300]}"
    except TooSlowError:
        how, fault = "hang", f"not done after {LIMIT_S} s: {traceback.format_exc()[-1500:]}"
    except MythosError as error:
        how, fault = "2", _unplaced(str(error), case)
    except Ended as ended:
        how = str(ended.code)
        fault = _unplaced(str(ended), case) if ended.code == USER_ERROR else f"exit code {how}: {str(ended)[-1500:]}"
    except BaseException as error:
        mendable = guard.user_error(error)
        how = "2" if mendable else "traceback"
        fault = _unplaced(str(mendable), case) if mendable else traceback.format_exc()[-1500:]
    finally:
        os.chdir("/")
    return Verdict(target, number, f"{mutation.what}: {how}", fault or _misdeed(artefacts, case, target, before))


def _unplaced(message: str, case: Case) -> str | None:
    # After a name of 300 letters, the length that a setting exceeds, the name of a tensor.
    said = (": file name too long", "the run's ", ": has values that are not finite")
    known = [*case.names, str(case.root), str(case.root.parent), *said]
    placed = any(name and name in message for name in known)
    one = message.count("Traceback") == 0
    return None if placed and one else f"a message without file, line or key: {message[-600:]!r}; {case.names}"


def _misdeed(artefacts: Path, case: Case, target: str, before: int) -> str | None:
    """What a case did beside its result: code that ran, files outside of its output, memory."""
    if case.canary.exists():
        return "code from the input was executed"
    allowed = {"out", "programs", "canary", *TARGETS[target].needs}
    stray = sorted(path.name for path in case.root.iterdir() if path.name not in allowed)
    for name in TARGETS[target].needs:
        stray += [] if name == "data" else _new_files(artefacts / name, case.root / name)
    if stray:
        return f"written outside of the output: {stray[:3]}"
    grown = _peak() - before
    return f"{grown / 2**20:.0f} MiB of memory" if grown > MEMORY_BYTES else None


def _new_files(whole: Path, found: Path) -> list[str]:
    if not whole.is_dir() or not found.is_dir():
        return []
    own = {path.relative_to(whole) for path in whole.rglob("*")}
    return [str(path) for path in found.rglob("*") if path.relative_to(found) not in own]


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def limit_memory() -> None:
    """Whatever a case asks for, this process gets only so much more than it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * MEMORY_BYTES, resource.RLIM_INFINITY))
