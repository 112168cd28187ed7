"""`python -m tests.fuzz`: many cases in long-lived processes; exit code 1 where one was not handled."""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mythos_ds import guard
from tests.fuzz import artefacts
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import LIMIT_S, Verdict, limit_memory, result_of_whole, run_case

PATIENCE_S = 3 * LIMIT_S
"""After which a process that does not even heed its alarm is ended."""
Job = tuple[str, int]


def serve(pipe: Connection, folder: Path, work: Path, seed: int) -> None:
    """A worker: cases come in, verdicts go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[guard.DEBUG] = "1"
    limit_memory()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while (job := pipe.recv()) is not None:
        pipe.send(asdict(run_case(folder, work, job[0], job[1], seed)))


class Worker:
    """A process with at most one case at a time, and its end of the pipe."""

    def __init__(self, folder: Path, work: Path, seed: int):
        self.arguments = (folder, work, seed)
        self.job: Job | None = None
        self._start()

    def _start(self) -> None:
        context: Any = get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, job: Job | None) -> None:
        """A case to try; None ends the process."""
        self.job, self.since = job, time.monotonic()
        self.pipe.send(job)

    def taken(self) -> Verdict | None:
        """The verdict, where there is one; a process that died or hangs is replaced, and that is the verdict."""
        assert self.job is not None
        try:
            if self.pipe.poll():
                return Verdict(**self.pipe.recv())
        except EOFError:
            self.process.join()
            return self._replaced(f"the process died (exit code {self.process.exitcode})")
        if time.monotonic() - self.since > PATIENCE_S:
            self.process.kill()
            self.process.join()
            return self._replaced(f"not done after {PATIENCE_S:.0f} s, and no signal ended it")
        return None

    def _replaced(self, fault: str) -> Verdict:
        assert self.job is not None
        verdict = Verdict(*self.job, "dead", fault)
        self._start()
        return verdict


def run(jobs: Sequence[Job], seed: int, processes: int) -> list[Verdict]:
    """The verdicts of all cases, in the order in which they ended."""
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    work = Path(tempfile.mkdtemp(prefix="mythos-fuzz-"))
    try:
        artefacts.build(work / "whole")
        for target in {target for target, _ in jobs}:
            result_of_whole(work / "whole", work, target)
        workers = [Worker(work / "whole", work, seed) for _ in range(processes)]
        return _verdicts(workers, list(reversed(jobs)))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _verdicts(workers: list[Worker], waiting: list[Job]) -> list[Verdict]:
    found: list[Verdict] = []
    busy = []
    for worker in workers:
        if waiting:
            worker.give(waiting.pop())
            busy.append(worker)
    while busy:
        wait([worker.pipe for worker in busy], timeout=1.0)
        for worker in list(busy):
            verdict = worker.taken()
            if verdict is None:
                continue
            found.append(verdict)
            if waiting:
                worker.give(waiting.pop())
            else:
                busy.remove(worker)
    for worker in workers:
        worker.give(None)
        worker.process.join()
    return found


def drawn(seed: int, count: int, only: Sequence[str] = ()) -> list[Job]:
    """As many cases of each target, in an order of the seed."""
    names = list(only) or list(TARGETS)
    jobs = [(names[place % len(names)], place // len(names)) for place in range(count)]
    random.Random(seed).shuffle(jobs)
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", choices=TARGETS, nargs="*", default=[])
    parser.add_argument("--case", help="one case, TARGET:NUMBER, to see what it does")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write every case that was not handled")
    options = parser.parse_args(argv)
    jobs = drawn(options.seed, options.count, options.only)
    if options.case:
        name, _, number = options.case.partition(":")
        jobs = [(name, int(number))]
    started = time.monotonic()
    verdicts = run(jobs, options.seed, options.processes)
    faults = [verdict for verdict in verdicts if verdict.fault is not None]
    ended = Counter((verdict.target, verdict.how.rpartition(": ")[2]) for verdict in verdicts)
    for target, how in sorted(ended):
        sys.stdout.write(f"{target:12} {how:10} {ended[target, how]}\n")
    for verdict in faults[:40]:
        sys.stdout.write(f"\n{verdict.target}:{verdict.number} ({verdict.how})\n{verdict.fault}\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in faults], indent=1))
    seconds = time.monotonic() - started
    sys.stdout.write(f"\n{len(verdicts)} cases of seed {options.seed} in {seconds:.0f} s, {len(faults)} not handled\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
