"""Write the file of a run that trains from given weights.

    mythos-ds init-config models/tiny --like tiny.json
    mythos-ds init-config looped --like tiny.json --data data/text --output run.json training.lr=1e-4

The model section is the weights' own; everything else is as in the other file, or as overridden. FOLDER is a model
folder, a Hugging Face folder of a mythos model, OpenMythos weights, a run or a checkpoint; "tiny" is the built-in one.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.config.loader import load_config
from mythos_ds.conversion.init_config import file_text, init_config
from mythos_ds.errors import OptionError
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("weights", type=Path, metavar="FOLDER", help="what training starts from")
    made.add_argument("--like", required=True, metavar="FILE", help="a run file or preset that says how to train")
    made.add_argument("--data", type=Path, action="append", default=[], metavar="PREFIX", help="prepared data; repeat")
    made.add_argument("--output", type=Path, help="default: FOLDER's last name and .json")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    output = arguments.output or Path(f"{arguments.weights.resolve().name}.json")
    if output.exists():
        raise OptionError(f"--output: given {output}, which exists; allowed: a new file")
    run, notes = init_config(arguments.weights, load_config(arguments.like), arguments.overrides, data=arguments.data)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, file_text(run))
    for note in notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"{output}: trains from {arguments.weights}; start: mythos-ds pretrain --config {output}\n")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
