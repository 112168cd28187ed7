"""How much of the exchange of rows two lanes hide (parallel.overlap), on one core with a simulated link.

The looped layers alone, forward and backward. What is computed is real; rows take as long on their way as all that is
computed, or half as long, and the clock jumps where they are waited for. A line of JSON for each case.

    mythos-ds bench-lanes
    mythos-ds bench-lanes --recompute layer --repetitions 5
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from mythos_ds.errors import OptionError
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--recompute", nargs="+", choices=("none", "layer", "loop"), default=["loop", "layer"])
    made.add_argument("--repetitions", type=int, default=3, help="timed runs of each case, of which the median counts")
    return made


def work(arguments: Namespace) -> None:
    if arguments.repetitions < 1:
        raise OptionError(f"--repetitions: given {arguments.repetitions}; allowed: 1 or more; nearest: 1")
    import torch

    from mythos_ds.bench.lanes import EXPERT_DIMS, measure

    torch.set_num_threads(1)
    for unit in arguments.recompute:
        for ratio in EXPERT_DIMS:
            for row in measure(ratio, unit, arguments.repetitions):
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
