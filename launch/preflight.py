"""Look at a cluster before training on it.

Start it as training will be started:

    mythos-ds preflight --config 1t.json                                # this host alone
    mythos-ds preflight --config 1t.json --hostfile hosts               # by ssh: hosts, versions, data, disk
    deepspeed --hostfile hosts --module mythos_ds preflight --config 1t.json   # the same, and devices and links
    srun mythos-ds preflight --config 1t.json --json > preflight.json

Exit code 0: ready to train; 1: a check failed; 2: the hostfile, the configuration or the command line is wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.cluster.preflight.report import Check, as_json, show
from mythos_ds.cluster.preflight.run import Preflight
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import USER_ERROR_EXIT_CODE, MythosError, OptionError, ParallelError
from mythos_ds.guard import guarded
from mythos_ds.slurm_step import in_shell


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a preset such as tiny or 1t.json")
    parser.add_argument("--run-dir", type=Path, help="default: that of training")
    parser.add_argument("--hostfile", type=Path, help="without a launcher: look at these hosts by ssh")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help="for all checks together")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--facts", nargs=2, metavar=("TOKEN", "PROCESSES"), help=argparse.SUPPRESS)  # over ssh
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def print_json(checks: Sequence[Check], hosts: Sequence[str], processes: int) -> None:
    print(as_json(checks, hosts, processes), flush=True)


def complain(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def preflight_of(arguments: argparse.Namespace) -> Preflight:
    """What a command line asks."""
    report = print_json if arguments.json else show
    return Preflight(arguments.config, arguments.overrides, arguments.run_dir, arguments.timeout, report, complain)


def run(arguments: argparse.Namespace) -> int:
    """Look as the command line says; the exit code. Raises MythosError for what the user can mend."""
    if not 0 < arguments.timeout < float("inf"):
        raise OptionError(f"--timeout: given {arguments.timeout:g}; allowed: seconds above 0; nearest: 180")
    preflight = preflight_of(arguments)
    if arguments.facts:
        token, processes = arguments.facts
        print(json.dumps(preflight.host_answer(token, int(processes))))
        return 0
    environment = ProcessEnvironment.detect(os.environ)
    if arguments.hostfile is None:
        return preflight.by_launcher(environment, os._exit)
    if environment.launcher != "python" and not in_shell(environment, os.environ):
        raise ParallelError(f"--hostfile has no effect under {environment.launcher}; remove it")
    return preflight.by_ssh(arguments.hostfile, Path(__file__).resolve())


def main(argv: list[str]) -> int:
    try:
        return run(parse_arguments(argv))
    except MythosError as error:
        complain(f"error: {error.report()}")
        return USER_ERROR_EXIT_CODE


if __name__ == "__main__":
    code = guarded("error", lambda: main(sys.argv[1:]))
    os._exit(code)  # threads of a process group now and then abort the interpreter's own way out
