"""Rewrite a training checkpoint so that it depends on no layout: safetensors and JSON, with optimizer state.

    python tools/reshard_checkpoint.py runs/big --output runs/big-portable
    deepspeed launch/pretrain.py --config 1t.json --resume runs/big-portable --run-dir runs/next parallel.ep_size=64

Training resumes from it in any layout (expert parallelism, data parallelism, ZeRO stage, pipeline, processes), as it
also does straight from another layout's checkpoint; the portable form is for keeping, moving, and reading without
DeepSpeed.
Goes on after an interruption when it is started again.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from shutil import copyfile

from conversion.estimate import estimate, print_estimate
from conversion.merging import newest_tag
from conversion.progress import byte_progress

from mythos_ds.checkpoint.portable import PORTABLE, open_state, read_layout, write_portable
from mythos_ds.checkpoint.tensor_writer import MAX_FILE_BYTES, plan_files
from mythos_ds.data.command import run_tool
from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.train.run_directory import RunDirectory


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path, help="a checkpoint (step_<n>) or a run's directory")
    made.add_argument("--output", type=Path, help="a new run directory; its checkpoints/ gets the portable one")
    made.add_argument("--jobs", type=int, default=1, help="files written at once")
    made.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES)
    made.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    made.add_argument("--bandwidth", type=float, default=2e9, help="bytes per second, for the time of --dry-run")
    made.add_argument("--json", action="store_true", help="print the plan or the result as JSON")
    return made


def work(arguments: Namespace) -> None:
    for name in ("jobs", "max_file_bytes", "bandwidth"):
        if getattr(arguments, name) <= 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: given {getattr(arguments, name)}; allowed: more than 0; nearest: 1")
    tag = newest_tag(arguments.checkpoint)
    if PORTABLE in read_layout(tag):
        raise CheckpointError(f"{tag}: is portable already; training resumes from it in any layout")
    sources, _ = open_state(tag)
    planned = [file for kind, s in sources.items() for file in plan_files(s.specs(), arguments.max_file_bytes, kind)]
    total = sum(file.nbytes for file in planned)
    made = estimate(planned, total, arguments.bandwidth)
    if arguments.dry_run:
        print_estimate(f"{tag}", made, arguments.json)
        return
    if arguments.output is None:
        raise ConfigError("--output: not given; the run directory to write the checkpoint to")
    target = RunDirectory(arguments.output)
    # The run's plan of its data: who resumes from here reads on where the run stopped.
    target.root.mkdir(parents=True, exist_ok=True)
    copyfile(RunDirectory(tag.resolve().parent.parent).manifest, target.manifest)
    with byte_progress("resharding", made.bytes) as progress:
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


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
