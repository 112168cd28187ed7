"""Pairs of jobs into one output, and kills, at random points that a seed reproduces.

    make torture
    python -m tests.torture --scale 0.1 --only reshard --seed 7

Prints a table by kind, and of each fault what was done and where its files are. Exit code 1 where there is any.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PAIRS = (
    ("merge fp32", "merge bf16"),
    ("merge fp32", "merge fp32"),
    ("merge one file", "merge fp32"),
    ("merge bf16", "convert hf"),
    ("merge one file", "average"),
    ("convert hf", "convert fp8"),
    ("convert hf", "convert hf fp32"),
    ("convert fp8", "convert fp8"),
    ("reshard", "reshard large"),
    ("reshard", "reshard"),
    ("average", "average weighted"),
    ("prepare a", "prepare b"),
)
KILLS = {
    "merge": ("merge fp32", "merge bf16", "merge one file", "merge in workers"),
    "convert": ("convert hf", "convert fp8", "convert hf fp32"),
    "reshard": ("reshard", "reshard large"),
    "prepare": ("prepare a", "prepare b"),
}
Result = TypeVar("Result")
COUNTS = {"pairs": 100, "merge": 60, "convert": 60, "reshard": 40, "prepare": 30, "train": 10}


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--scale", type=float, default=1.0, help="of the counts")
    made.add_argument("--only", choices=tuple(COUNTS), action="append", help="one kind; may be repeated")
    made.add_argument("--number", type=int, help="with --only: that trial alone")
    return made


def import_everything() -> None:
    """What the jobs import late, so that forked ones find it there."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    import deepspeed  # noqa: F401
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401
    from megatron.core.datasets import indexed_dataset  # noqa: F401

    import mythos_hf  # noqa: F401


def main(arguments: Namespace) -> int:
    """Run the trials of each kind and print the table."""
    import_everything()
    from tests.torture.jobs import make_jobs
    from tests.torture.training import Trainings
    from tests.torture.trials import Torture, Trial

    scratch = Path(tempfile.mkdtemp(prefix="torture-"))
    torture, trainings = Torture(scratch / "jobs", make_jobs(scratch / "inputs")), Trainings(scratch / "training")
    makers: dict[str, Callable[[int, random.Random], Trial]] = {
        "pairs": lambda number, generator: torture.pair(*PAIRS[number % len(PAIRS)], generator),
        "train": lambda number, generator: trainings.kill(generator),
    }
    for kind, names in KILLS.items():
        makers[kind] = lambda number, generator, names=names: torture.kill(names[number % len(names)], generator)  # type: ignore[misc]
    rows, failed = [], []
    for kind in arguments.only or COUNTS:
        started = time.monotonic()
        trials = list(_run(kind, makers[kind], arguments))
        bad = [(number, trial) for number, trial in trials if trial.faults]
        interrupted = sum(trial.interrupted for _, trial in trials)
        rows.append((kind, len(trials), interrupted, len(bad), f"{time.monotonic() - started:.0f}"))
        failed += [(kind, number, trial) for number, trial in bad]
    _print(rows)
    for kind, number, trial in failed:
        sys.stdout.write(f"--only {kind} --number {number} --seed {arguments.seed}: {trial.what}\n")
        sys.stdout.write("".join(f"    {fault}\n" for fault in trial.faults))
    if failed:
        sys.stdout.write(f"their files: {scratch}\n")
        return 1
    shutil.rmtree(scratch)
    return 0


def _run(kind: str, make: Callable[[int, random.Random], Result], arguments: Namespace) -> Iterator[tuple[int, Result]]:
    count = max(1, round(COUNTS[kind] * arguments.scale))
    numbers = range(count) if arguments.number is None else [arguments.number]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Without a thread of its own: this process is forked.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(kind, total=len(numbers))
        for number in numbers:
            yield number, make(number, random.Random(f"{arguments.seed}/{kind}/{number}"))
            progress.advance(task)
            progress.refresh()


def _print(rows: Sequence[tuple[object, ...]]) -> None:
    table = Table(title="torture")
    for heading in ("kind", "trials", "interrupted or refused", "faults", "seconds"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
