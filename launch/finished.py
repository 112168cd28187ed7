"""Whether a run has reached its planned length: exit code 0; or stopped before: 75, start it again. No torch.

mythos-ds finished --config 1t.json [--run-dir DIR] ...      # the arguments of pretrain
mythos-ds finished --config 1t.json --proxy --world-size 8   # a proxy's directory: on so many processes
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from mythos_ds.launch.pretrain import parse_arguments

from mythos_ds.config.loader import load_config
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import MythosError
from mythos_ds.guard import guarded
from mythos_ds.io import read_json
from mythos_ds.resilience.failure import fail
from mythos_ds.train.run_directory import default_run_directory

UNFINISHED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h."""


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.dry_run or arguments.print_config:
        return 0
    try:
        run_dir = arguments.run_dir or _default(arguments)
    except MythosError as error:
        return fail(error, None)
    try:
        total = int(read_json(run_dir / "manifest.json", dict[str, Any])["total_steps"])
        # Published checkpoints have a manifest; `latest` may be lost, and training does without it.
        saved = (run_dir / "checkpoints").glob("step_*/manifest.json")
        step = max(int(manifest.parent.name.rpartition("_")[2]) for manifest in saved)
    except (MythosError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"{run_dir}: stopped before its first checkpoint ({error})")
        return UNFINISHED_EXIT_CODE
    print(f"{run_dir}: step {step} of {total} is saved")
    return 0 if step >= total else UNFINISHED_EXIT_CODE


def _default(arguments: Namespace) -> Path:
    """The directory that pretrain.py chose. MythosError."""
    loaded = load_config(arguments.config, arguments.overrides)
    if not arguments.proxy:
        return default_run_directory(loaded)
    return default_run_directory(
        loaded, arguments.world_size or arguments.processes or ProcessEnvironment.detect(os.environ).world_size
    )


if __name__ == "__main__":
    sys.exit(guarded("error", lambda: main(sys.argv[1:])))
