"""Hold the planner's predictions against real engines on this machine, layout by layout, and write the table.

    mythos-ds calibrate                                # writes docs/calibration.md and docs/calibration.json
    mythos-ds calibrate --only "EP 2, ZeRO-3" --output /tmp/calibration

Each layout trains a small model for three steps with 2 to 4 processes; in the third, every tensor and every byte handed
to a collective is counted on each rank. For pipelines another third step measures how long the processes wait for each
other; for exchanges a loop does how long they wait for rows.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mythos_ds.bench.calibration import (
    CASES,
    EXCHANGES,
    PIPELINES,
    measure,
    measure_idle,
    measure_waits,
    write_calibration,
)
from mythos_ds.errors import OptionError
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path("docs"), help="folder of calibration.md and calibration.json")
    made.add_argument("--only", action="append", help="a layout by its name; may be given again")
    return made


def work(arguments: Namespace) -> None:
    names = [case.name for case in (*CASES, *PIPELINES, *EXCHANGES)]
    if unknown := [name for name in arguments.only or () if name not in names]:
        raise OptionError(f"--only: given {unknown[0]!r}; allowed: {', '.join(names)}")
    rows, pipelines, exchanges = [], [], []
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            rows.append(measure(case))
            sys.stderr.write(f"{case.name}: memory {rows[-1].memory_error:+.1%}\n")
    for case in PIPELINES:
        if not arguments.only or case.name in arguments.only:
            pipelines.append(measure_idle(case))
            idle = pipelines[-1]
            sys.stderr.write(f"{case.name}: idle {idle.measured:.2%}, predicted {idle.predicted:.2%}\n")
    for case in EXCHANGES:
        if not arguments.only or case.name in arguments.only:
            exchanges.append(measure_waits(case))
            waits = exchanges[-1]
            sys.stderr.write(f"{case.name}: {waits.measured:.3f} of its work, predicted {waits.predicted:.3f}\n")
    write_calibration(arguments.output, rows, pipelines, exchanges)


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
