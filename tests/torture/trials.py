"""Single trials: two jobs into one output, and a job that is killed and started again."""

import random
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.torture.forked import Child, start
from tests.torture.jobs import Job, differences, published_faults, tree

_REFUSALS = ("is being written by process", "something else", "holds checkpoints", "another run's", "exists")
_EARLY = 0.15
"""Share of the kills that may come at any time; the others come while the output is written."""


@dataclass(frozen=True)
class Undisturbed:
    """What a job writes when left alone, how long it takes, when it begins to write, and how many changes it makes."""

    files: dict[str, str]
    seconds: float
    first_write: float
    changes: int


@dataclass(frozen=True)
class Trial:
    """What was done, and what was wrong with what came of it."""

    what: str
    faults: list[str]
    interrupted: bool


class Torture:
    """Trials in folders below `scratch`; those of failed ones stay."""

    def __init__(self, scratch: Path, jobs: dict[str, Job]):
        self.scratch, self.jobs = scratch, jobs
        self._known: dict[str, Undisturbed] = {}
        self._number = 0

    def undisturbed(self, name: str) -> Undisturbed:
        """Of a job; it is run once. Raises AssertionError where it fails by itself."""
        if name not in self._known:
            place = self._place()
            child = self._start(name, place, "alone.log", counted=True)
            first = None
            while first is None and time.monotonic() - child.started < 100:
                first = time.monotonic() - child.started if any(place.iterdir()) else None
                time.sleep(0.0005)
            code, seconds = child.wait(), time.monotonic() - child.started
            assert code == 0, f"{name} alone: exit code {code}\n{child.output}"
            found = re.findall(r"^changes (\d+)$", child.output, re.M)
            self._known[name] = Undisturbed(tree(place), seconds, first or 0.0, int(found[-1]))
            self._done(place)
        return self._known[name]

    def pair(self, first: str, second: str, generator: random.Random) -> Trial:
        """Start two jobs into one output, nearly at once. One must write all of it, the other must be refused, or find
        its own work done."""
        names = [first, second]
        known = [self.undisturbed(name) for name in names]
        generator.shuffle(names)
        known = [self.undisturbed(name) for name in names]
        place, pause = self._place(), generator.uniform(0, 0.5) * known[0].seconds
        children = [self._start(names[0], place, "one.log")]
        time.sleep(pause)
        children.append(self._start(names[1], place, "two.log"))
        codes = [child.wait() for child in children]
        winners = [number for number, code in enumerate(codes) if code == 0]
        faults = [] if winners else ["neither of the two has written the output"]
        for number, code in enumerate(codes):
            faults += self._refusal_faults(names[number], code, children[number])
        if len(winners) == len(names) and known[0].files != known[1].files:
            faults.append("two different jobs have both ended with 0")
        if winners:
            faults += differences(tree(place), known[winners[0]].files)
            faults += published_faults(self.jobs[names[winners[0]]], place)
        self._done(place, keep=bool(faults))
        return Trial(f"{names[0]} and, {pause:.3f} s later, {names[1]}: codes {codes}", faults, len(winners) == 1)

    def kill(self, name: str, generator: random.Random) -> Trial:
        """Kill a job, between two changes of files or at some moment, and start it again. What looks complete must be
        whole at any time, and the rerun must bring what an undisturbed job brings."""
        known, place = self.undisturbed(name), self._place()
        if generator.random() < 0.5:
            at = generator.randrange(known.changes)
            where = f"before change {at} of {known.changes}"
            first = self.kill_at(name, place, at)
        else:
            early = generator.random() < _EARLY
            seconds = generator.uniform(0 if early else 0.9 * known.first_write, known.seconds)
            where = f"after {seconds:.3f} of {known.seconds:.3f} s"
            first = self._start(name, place, "first.log").kill_after(seconds)
        faults = published_faults(self.jobs[name], place)
        again = self._start(name, place, "again.log")
        code = again.wait()
        if code != 0 and differences(tree(place), known.files):
            faults.append(f"started again it ends with {code}: {_last_line(again)}")
        faults += differences(tree(place), known.files)
        self._done(place, keep=bool(faults))
        return Trial(f"{name}, killed {where}: code {first}, again {code}", faults, first == -9)

    def kill_at(self, name: str, place: Path, change: int) -> int:
        """Run a job in `place` that is killed just before a change of files; its exit code."""
        return self._start(name, place, "first.log", killed_at=change).wait()

    def _refusal_faults(self, name: str, code: int, child: Child) -> Iterable[str]:
        text = child.output
        if code == 0 or (code == 2 and any(words in text for words in _REFUSALS) and "Traceback" not in text):
            return []
        return [f"{name} ends with {code}: {_last_line(child)}"]

    def _start(self, name: str, place: Path, log: str, *, killed_at: int | None = None, counted: bool = False) -> Child:
        job = self.jobs[name]
        path = place.with_name(f"{place.name}.{log}")
        watched = place if counted or killed_at is not None else None
        return start(lambda: job.run(place), path, killed_at=killed_at, changes_in=watched)

    def _place(self) -> Path:
        self._number += 1
        place = self.scratch / f"trial_{self._number:04d}"
        place.mkdir(parents=True)
        return place

    def _done(self, place: Path, *, keep: bool = False) -> None:
        if not keep:
            shutil.rmtree(place)
            for log in place.parent.glob(f"{place.name}.*"):
                log.unlink()


def _last_line(child: Child) -> str:
    lines = [line for line in child.output.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it says nothing'} ({child.log})"
