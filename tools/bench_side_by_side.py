"""Time of the model, its experts and its loss beside open-mythos and transformers, on one thread of a CPU.

All sides compute the same numbers, which is checked; they run in turn, and the least time of each counts. Ratios are
times of the others over ours. Needs the packages of requirements.lock.

    mythos-ds bench-side-by-side
    mythos-ds bench-side-by-side --only moe cross-entropy --repetitions 10
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from mythos_ds.mains import run_tool

CASES = ("mla-4", "gqa-4", "mla-16", "moe", "cross-entropy")


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="attention and loops, or a part")
    made.add_argument("--repetitions", type=int, default=7, help="timed runs of each side")
    return made


def work(arguments: Namespace) -> None:
    """Prints one JSON object per comparison, as it is made."""
    from mythos_ds.bench.side_by_side import compare

    for name in arguments.only:
        for result in compare(name, arguments.repetitions):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
