"""Train a model from one JSON file.

    mythos-ds pretrain --config tiny.json --processes 2
    deepspeed --module mythos_ds pretrain --config tiny.json
    torchrun --nproc_per_node 8 -m mythos_ds pretrain --config 1b.json training.max_steps=1000
    mythos-ds pretrain --config 1t.json --dry-run

The same command resumes an interrupted run. Exit code 2: the message on stderr says what to mend.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_ds.cluster.local_processes import run_processes
from mythos_ds.config.loader import LoadedConfig, load_config
from mythos_ds.config.proxy import make_proxies
from mythos_ds.config.resolve import ResolvedRun, ResolvedStage, planned_world_size, resolve_stages, whole_file
from mythos_ds.config.schema import PROCESSES
from mythos_ds.config.training_stages import stages_from
from mythos_ds.environment import ProcessEnvironment, prefer_expandable_segments
from mythos_ds.errors import MythosError, OptionError
from mythos_ds.guard import DEBUG, guarded, user_error
from mythos_ds.mains import add_common, add_share, refuse_dashes
from mythos_ds.resilience.failure import fail
from mythos_ds.slurm_step import in_shell
from mythos_ds.train.run_directory import another_layout_note, default_run_directory

if TYPE_CHECKING:
    from mythos_ds.train.run import OpenWeights


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a preset such as tiny or 1t.json")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<config name>; docs/launch.md")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to go on from")
    parser.add_argument(
        "--stage", metavar="NAME", help="with --resume PATH and a new --run-dir: begin this training stage there"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="execute what a checkpoint or weights contain; only for files you trust",
    )
    parser.add_argument("--processes", type=int, help="start so many processes on this machine; needs no launcher")
    parser.add_argument("--proxy", action="store_true", help="the same structure at laptop size")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and exit; needs no torch")
    parser.add_argument("--print-config", action="store_true", help="print the full configuration as JSON and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: processes to plan for")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    add_share(parser)
    add_common(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    refuse_dashes(parser, argv)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    prefer_expandable_segments(os.environ)
    arguments = parse_arguments(argv)
    if arguments.debug:
        os.environ[DEBUG] = "1"
    return guarded("error", lambda: trained(arguments, argv), arguments.run_dir)


def trained(arguments: argparse.Namespace, argv: list[str]) -> int:
    """The exit code; what every rank meets is told by one."""
    environment: ProcessEnvironment | None = None
    try:
        environment = detect(arguments)
        check_counts(arguments, environment)
        if arguments.processes is not None and environment.launcher == "python" and not is_plan(arguments):
            return start(arguments, environment, argv)
        run(arguments, environment, argv)
    except MythosError as error:
        return fail(error, environment)
    except OSError as error:
        mendable = user_error(error)
        if mendable is None or isinstance(error, BrokenPipeError):
            raise
        return fail(mendable, environment)
    return 0


def detect(arguments: argparse.Namespace) -> ProcessEnvironment:
    """The launcher's environment; none where --processes is given in an interactive shell of Slurm."""
    environment = ProcessEnvironment.detect(os.environ)
    if arguments.processes is not None and in_shell(environment, os.environ):
        return ProcessEnvironment.detect({})
    return environment


def is_plan(arguments: argparse.Namespace) -> bool:
    return bool(arguments.dry_run or arguments.print_config)


def check_counts(arguments: argparse.Namespace, environment: ProcessEnvironment) -> None:
    """Raises ConfigError for numbers of processes that make no sense, or that nothing would start."""
    for name in ("world_size", "processes"):
        asked = getattr(arguments, name)
        if asked is not None and asked < 1:
            raise OptionError(f"--{name.replace('_', '-')}: given {asked}; allowed: at least 1; nearest: 1")
        if asked is not None and asked > PROCESSES:
            raise OptionError(f"--{name.replace('_', '-')}: given {asked}; allowed: at most {PROCESSES}")
    if arguments.world_size is not None and not is_plan(arguments):
        given = f"--world-size: given {arguments.world_size}"
        raise OptionError(f"{given}; allowed: with --dry-run (a launcher or --processes starts the processes)")
    if arguments.processes is None:
        return
    if arguments.world_size not in (None, arguments.processes):
        raise OptionError(
            f"--processes: given {arguments.processes} with --world-size {arguments.world_size}; give one"
        )
    if environment.launcher != "python" and environment.world_size != arguments.processes:
        raise OptionError(
            f"--processes: given {arguments.processes}; allowed: without a launcher, and {environment.launcher} has "
            f"started {environment.world_size} processes; nearest: none"
        )


def start(arguments: argparse.Namespace, environment: ProcessEnvironment, argv: list[str]) -> int:
    """Start the processes, once it is known that they can run the configuration; the exit code. MythosError."""
    many = replace(environment, world_size=arguments.processes, local_world_size=arguments.processes)
    plan(arguments, loaded_config(arguments), many)
    return run_processes([sys.executable, "-m", "mythos_ds", "pretrain", *argv], arguments.processes)


def loaded_config(arguments: argparse.Namespace) -> LoadedConfig:
    return load_config(arguments.config, arguments.overrides, allow_pickle=arguments.allow_pickle)


def run(arguments: argparse.Namespace, environment: ProcessEnvironment, argv: list[str]) -> None:
    loaded = loaded_config(arguments)
    first = environment.rank == 0
    stages, changes = plan(arguments, loaded, environment)
    if first and changes:
        print("\n".join(changes), flush=True)
    if arguments.print_config or arguments.dry_run:
        if first:
            print(describe(arguments, stages))
        return
    # Imports torch and DeepSpeed, which a dry run and a wrong configuration need not wait for.
    from mythos_ds.train.run import RunRequest, train

    run_dir = arguments.run_dir
    if run_dir is None:
        run_dir = default_run_directory(loaded, environment.world_size if arguments.proxy else None)
        note = another_layout_note(loaded, run_dir)
        if first and note and arguments.resume == "auto" and not arguments.proxy:
            print(note, flush=True)
    request = RunRequest(
        stages,
        loaded.text,
        run_dir,
        arguments.resume,
        tuple(argv),
        arguments.allow_pickle,
        arguments.share,
        arguments.stage,
        str(loaded.path),
    )
    train(request, environment, open_weights=opener(stages[0].run, arguments.allow_pickle))


def opener(resolved: ResolvedRun, allow_pickle: bool) -> "OpenWeights | None":
    """What reads the weights that training starts from; None where they are random."""
    if resolved.config.training.init_from is None:
        return None
    from mythos_ds.conversion.starting_weights import open_starting_weights

    return functools.partial(open_starting_weights, allow_pickle=allow_pickle)


def plan(
    arguments: argparse.Namespace, loaded: LoadedConfig, environment: ProcessEnvironment
) -> tuple[tuple[ResolvedStage, ...], list[str]]:
    """The training stages from `--stage` on, and what a proxy changes of them."""
    config = loaded.config
    stages = stages_from(loaded.stages, arguments.stage, str(loaded.path))
    changes: list[str] = []
    world_size = environment.world_size
    asked = arguments.world_size if arguments.processes is None else arguments.processes
    if asked is not None:
        world_size = asked
    elif is_plan(arguments) and environment.launcher == "python":
        world_size = 1 if arguments.proxy else planned_world_size(config)
    if arguments.proxy:
        stages, changes = make_proxies(stages, world_size, loaded.stages)
    ahead = len(loaded.stages) - len(stages)
    return resolve_stages(stages, world_size, loaded.stages[ahead - 1] if ahead else None), changes


def describe(arguments: argparse.Namespace, stages: Sequence[ResolvedStage]) -> str:
    if arguments.print_config:
        return json.dumps(whole_file(stages), indent=2)
    reports = [report(stage.run) for stage in stages]
    if stages[0].name is None:
        return reports[0]
    heads = [f"training stage {number} of {len(stages)}: {stage.name}" for number, stage in enumerate(stages, 1)]
    return "\n\n".join(f"{head}\n{text}" for head, text in zip(heads, reports, strict=True))


def report(resolved: ResolvedRun) -> str:
    """What a dry run says of a training stage."""
    from mythos_ds.costs.dry_run import dry_run_report
    from mythos_ds.data.validation import held_out, validation_notes

    config = resolved.config
    found = held_out(config.data, config.training)
    notes = validation_notes(config.data, config.training)
    return "\n".join([*notes, dry_run_report(resolved, found.text if found else None)])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)  # threads of a process group now and then abort the interpreter's own way out
