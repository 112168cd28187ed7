"""Rewrite a training checkpoint so that it depends on no layout: safetensors and JSON, with optimizer state.

    mythos-ds reshard runs/big --output runs/big-portable
    deepspeed --module mythos_ds pretrain --config 1t.json --resume runs/big-portable --run-dir runs/next \\
        parallel.ep_size=64

Training resumes from it in any layout (expert parallelism, data parallelism, ZeRO stage, pipeline, processes), as it
also does straight from another layout's checkpoint; the portable form is for keeping, moving, and reading without
DeepSpeed.
Goes on after an interruption when it is started again.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mythos_ds.checkpoint import manifest as files
from mythos_ds.checkpoint.portable import open_whole_state, unfinished, write_portable
from mythos_ds.checkpoint.training_state import PORTABLE, read_layout
from mythos_ds.conversion.estimate import estimate, print_estimate
from mythos_ds.conversion.merge import newest_tag
from mythos_ds.conversion.writing_options import BANDWIDTH, add_writing, check_writing
from mythos_ds.conversion.written_model import refuse_input
from mythos_ds.errors import CheckpointError, OptionError
from mythos_ds.io import new_file, read_bytes
from mythos_ds.mains import add_share, run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.output_lock import locked_output
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.weights.safe_load import executing_pickles
from mythos_ds.weights.writer import plan_files


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path, help="a checkpoint (step_<n>) or a run's directory")
    made.add_argument("--output", type=Path, help="a new run directory; its checkpoints/ gets the portable one")
    made.add_argument("--allow-pickle", action="store_true", help="let the checkpoint's files run the code they name")
    add_writing(made)
    add_share(made)
    return made


def work(arguments: Namespace) -> None:
    check_writing(arguments)
    with executing_pickles(arguments.allow_pickle):
        reshard(arguments)


def reshard(arguments: Namespace) -> None:
    """Rewrite the checkpoint that the arguments name, or say what that takes."""
    tag = newest_tag(arguments.checkpoint)
    if PORTABLE in read_layout(tag):
        raise CheckpointError(f"{tag}: is portable already; training resumes from it in any layout")
    sources, _ = open_whole_state(tag)
    planned = [file for kind, s in sources.items() for file in plan_files(s.specs(), arguments.max_file_bytes, kind)]
    total = sum(file.nbytes for file in planned)
    made = estimate(planned, total, arguments.bandwidth or BANDWIDTH)
    if arguments.dry_run:
        print_estimate(f"{tag}", made, arguments.json)
        return
    if arguments.output is None:
        raise OptionError("--output: not given; the run directory to write the checkpoint to")
    target = RunDirectory(arguments.output)
    refuse_input(arguments.output, [tag])
    locked = locked_output(arguments.output, "reshard", break_lock=arguments.break_lock)
    with locked, byte_progress("resharding", made.bytes) as progress:
        take_manifest(tag, target)
        written = write_portable(
            tag,
            target.checkpoints,
            jobs=arguments.jobs,
            max_file_bytes=arguments.max_file_bytes,
            progress=progress,
        )
    if arguments.json:
        sys.stdout.write(json.dumps({"checkpoint": str(written), "bytes": made.bytes, "files": made.files}) + "\n")
    else:
        print_estimate(f"{written}", made, as_json=False)


def take_manifest(tag: Path, target: RunDirectory) -> None:
    """Give the new run the plan of its data: who resumes from there reads on where the run stopped. Raises
    CheckpointError where there is no such plan, or `target` is another run."""
    manifest = RunDirectory(tag.resolve().parent.parent).manifest
    if not manifest.is_file():
        raise CheckpointError(f"{manifest}: not found; the run's must lie two folders above the checkpoint")
    content = read_bytes(manifest)
    if files.list_tags(target.checkpoints) and not unfinished(target.checkpoints, tag):
        raise CheckpointError(f"{target.checkpoints}: holds checkpoints; choose another output")
    if target.manifest.is_file() and read_bytes(target.manifest) != content:
        raise CheckpointError(f"{target.manifest}: is another run's; choose another output")
    with new_file(target.manifest) as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
