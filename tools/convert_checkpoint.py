"""Convert a model: OpenMythos to mythos and back, or a dense Hugging Face model to mythos.

    python tools/convert_checkpoint.py --from openmythos --to mythos --input weights --output imported
    python tools/convert_checkpoint.py --from mythos --to openmythos --input imported --output back
    python tools/convert_checkpoint.py --from hf --to mythos --input llama --output looped \\
        --prelude 4 --recurrent 6 --coda 4

Tensors are read a few rows at a time; the same command goes on after an interruption. The last form cuts a dense model
(llama, mistral, qwen3) into prelude, recurrent block and coda, and makes mixtures of experts of the block's
feed-forwards. docs/convert.md says what is exact. --dry-run prints what would be written, and writes nothing.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.estimate import Estimate, estimate, print_estimate
from conversion.progress import byte_progress
from conversion.routes import CUT_FLAGS, DTYPES, SOURCES, TARGETS, Request, Route, plan_route

from mythos_ds.checkpoint.tensor_writer import MAX_FILE_BYTES, plan_files, write_tensors
from mythos_ds.data.command import run_tool
from mythos_ds.errors import ConfigError

_BANDWIDTH = 2e9


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--from", dest="source", choices=SOURCES, required=True, help="format of the input")
    made.add_argument("--to", dest="target", choices=TARGETS, required=True, help="format of the output")
    made.add_argument("--input", type=Path, required=True, help="model folder; of OpenMythos also a file")
    made.add_argument("--output", type=Path, required=True, help="a new folder")
    made.add_argument("--dtype", choices=DTYPES, help="of matrices; default: as in the input")
    made.add_argument("--allow-pickle", action="store_true", help="let a pickled input run the code it names")
    made.add_argument("--jobs", type=int, default=1, help="files written at once")
    made.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES)
    made.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    made.add_argument("--bandwidth", type=float, help=f"with --dry-run: bytes per second (default {_BANDWIDTH:.0e})")
    made.add_argument("--json", action="store_true", help="print the plan or the result as JSON")
    cut = made.add_argument_group("cutting a dense model (--from hf --to mythos)")
    for name, text in CUT_FLAGS.items():
        cut.add_argument("--" + name.replace("_", "-"), type=int, help=text)
    return made


def work(arguments: Namespace) -> None:
    check(arguments)
    given = {name: getattr(arguments, name) for name in CUT_FLAGS if getattr(arguments, name) is not None}
    request = Request(
        arguments.source,
        arguments.target,
        arguments.input,
        arguments.dtype,
        allow_pickle=arguments.allow_pickle,
        cut=given,
    )
    route = plan_route(request)
    files = plan_files(route.source.specs(), arguments.max_file_bytes)
    made = estimate(files, route.read_bytes, arguments.bandwidth or _BANDWIDTH)
    if not arguments.dry_run:
        with byte_progress("converting", made.bytes) as progress:
            write_tensors(
                route.source,
                arguments.output,
                jobs=arguments.jobs,
                max_file_bytes=arguments.max_file_bytes,
                progress=progress,
            )
        route.finish(arguments.output)
    report(arguments, route, made)


def check(arguments: Namespace) -> None:
    """Raises ConfigError for arguments that do not fit together, or without effect."""
    for name in ("jobs", "max_file_bytes", "bandwidth"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: given {value:g}; allowed: more than 0; nearest: 1")
    if arguments.bandwidth is not None and not arguments.dry_run:
        raise ConfigError("--bandwidth: given without --dry-run; allowed: with it, for the time it prints")
    if arguments.output.resolve() == arguments.input.resolve():
        raise ConfigError(f"--output: given {arguments.output}, which is the input; allowed: a new folder")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ConfigError(f"--output: given {arguments.output}, which is a file; allowed: a new folder")


def report(arguments: Namespace, route: Route, made: Estimate) -> None:
    """What was, or would be, written."""
    if arguments.json:
        result: dict[str, Any] = {
            "from": arguments.source,
            "to": arguments.target,
            "dtype": route.dtype,
            "notes": route.notes,
            "written": not arguments.dry_run,
            "estimate": asdict(made),
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write("".join(f"{note}\n" for note in route.notes))
    print_estimate(f"{arguments.output}{' (nothing written)' if arguments.dry_run else ''}", made, False)


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
