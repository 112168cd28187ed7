"""Time of one optimizer step on DeepSpeed against plain torch, a pipeline against none, or recomputation.

Both sides train the same model on the same global batches and loop counts, on the same cores; runs alternate, and only
their ratio is quoted. With a pipeline the idle share of its processes is measured too, beside what its simulation says.

    mythos-ds bench-step --config tiny.json --processes 2
    mythos-ds bench-step --config tiny.json --processes 2 --against unpipelined parallel.pp_size=2 ...
    mythos-ds bench-step --config tiny.json --against unrecomputed parallel.activation_checkpointing=layer
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from mythos_ds.bench.step import AGAINST, compare_steps
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--config", default="tiny.json")
    made.add_argument("--processes", type=int, default=2, help="processes of a DeepSpeed side, threads of torch's")
    made.add_argument("--against", choices=tuple(AGAINST), default="torch")
    made.add_argument("--steps", type=int, default=20, help="timed steps of one run")
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    """Runs both sides in turn and prints one JSON object."""
    result = compare_steps(
        arguments.config,
        arguments.overrides,
        processes=arguments.processes,
        against=arguments.against,
        steps=arguments.steps,
        repetitions=arguments.repetitions,
    )
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
