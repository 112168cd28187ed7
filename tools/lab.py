"""Run a study, or put all results into one report.

    mythos-ds lab khop
    mythos-ds lab loops --scale gpu --jobs 1
    mythos-ds lab khop --arms looped fixed --seeds 0
    mythos-ds lab report

A study trains its models through the project's trainer, a process each, and writes tables, pictures and numbers to
docs/lab/<study>/. Ctrl-C keeps what is done; the same command goes on. With --arms or --seeds only these runs are
trained, and a table of them is written beside the runs; once all are there, the study without these options trains
nothing and writes its own tables.
"""

import shlex
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mythos_ds.errors import LabError
from mythos_ds.guard import INTERRUPTED_EXIT_CODE
from mythos_ds.lab.studies.registry import STUDIES
from mythos_ds.lab.study import Study, write_report
from mythos_ds.lab.subset import select, subset_report
from mythos_ds.lab.summary_page import write_summary
from mythos_ds.lab.sweep import run_all, run_folder
from mythos_ds.mains import run_tool
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.provenance import describe, git_commit


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("study", choices=[*STUDIES, "report"])
    made.add_argument("--scale", default="cpu", help="cpu: sizes for a laptop; gpu: for one GPU; khop also has smoke")
    made.add_argument(
        "--arms", nargs="+", metavar="ARM", help="train these only: looped, or with its size, 'S8 R6/looped'"
    )
    made.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="train these only")
    made.add_argument("--output", type=Path, default=Path("runs/lab"), help="where runs are kept")
    made.add_argument("--docs", type=Path, default=Path("docs/lab"), help="where results are written")
    made.add_argument("--jobs", type=int, default=2, help="runs at once")
    return made


def work(arguments: Namespace) -> None:
    if arguments.study == "report":
        if arguments.arms or arguments.seeds:
            raise LabError("--arms, --seeds: given with report, which trains nothing; leave them out")
        sys.stdout.write(f"{write_summary(arguments.docs)}\n")
        return
    study = STUDIES[arguments.study]
    if arguments.scale not in study.scales:
        raise LabError(f"--scale: given {arguments.scale}; allowed for {study.name}: {', '.join(study.scales)}")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_study(study, arguments)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        sys.exit(INTERRUPTED_EXIT_CODE)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A batch system's signal stops the runs in order, as Ctrl-C does."""
    raise KeyboardInterrupt


def run_study(study: Study, arguments: Namespace) -> None:
    study.needs()
    output = arguments.output.resolve()
    every = study.runs(arguments.scale, str(output / "data"))
    specs = select(every, arguments.arms, arguments.seeds)
    started = time.time()
    results = run_all(specs, output, jobs=arguments.jobs, limit_s=study.limit_s)
    minutes = sum(result.get("seconds", 0) for result in results.values()) / 60
    header = {
        "question": study.title,
        "command": f"`mythos-ds lab {study.name} --scale {arguments.scale}{_chosen(arguments)}`",
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "hardware": describe(gpu_name()),
        "code": git_commit() or "unknown",
        "runs": f"{len(specs)}, {minutes:.0f} process-minutes",
    }
    name = study.name if arguments.scale == "cpu" else f"{study.name}-{arguments.scale}"
    if len(specs) == len(every):
        folder = arguments.docs / name
        folders = {key: run_folder(output, spec) for key, spec in specs.items()}
        report = study.analyse(results, folders, arguments.scale)
    else:
        folder = output / "subsets" / name
        report = subset_report(results)
        header["subset"] = f"{len(specs)} of the study's {len(every)} runs; its own tables need all of them"
    write_report(study, report, folder, header)
    sys.stdout.write(f"{folder / 'results.md'}\n")


def _chosen(arguments: Namespace) -> str:
    arms = f" --arms {shlex.join(arguments.arms)}" if arguments.arms else ""
    return arms + (f" --seeds {' '.join(map(str, arguments.seeds))}" if arguments.seeds else "")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
