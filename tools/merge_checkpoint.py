"""Merge a training checkpoint into one model: config.json, safetensors, tokenizer.

    mythos-ds merge runs/quickstart --output merged
    mythos-ds merge runs/big/checkpoints/step_00010000 --output merged --dtype bfloat16 --jobs 16
    mythos-ds merge --config 1t.json --processes 1024 --dry-run

Works for every layout (expert parallelism, ZeRO 0 to 3, pipeline), reads a few rows at a time, and goes on after an
interruption when it is started again. --dry-run says what will be written and what it takes; with --config it needs no
checkpoint at all.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.conversion.estimate import estimate, print_estimate
from mythos_ds.conversion.merge import merge, merged_source, model_of, newest_tag
from mythos_ds.conversion.model_target import folder_dtype
from mythos_ds.conversion.planned_checkpoint import planned_tensors
from mythos_ds.conversion.writing_options import BANDWIDTH, add_writing, check_writing, refuse_output_in_run
from mythos_ds.data.tokenizer_files import has_tokenizer
from mythos_ds.errors import CheckpointError, OptionError
from mythos_ds.mains import add_share, run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.reader import TensorSpec
from mythos_ds.weights.safe_load import executing_pickles
from mythos_ds.weights.whole_model import expected_specs
from mythos_ds.weights.writer import plan_files

_FP32_BYTES = 4


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint (step_<n>) or a run's directory")
    made.add_argument("--output", type=Path, help="folder of the merged model")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrices")
    made.add_argument("--tokenizer", type=Path, help="file or folder; default: the run's, where it is at hand")
    made.add_argument("--allow-pickle", action="store_true", help="let the checkpoint's files run the code they name")
    made.add_argument("--config", help="with --dry-run: plan for a configuration instead of a checkpoint")
    made.add_argument("--processes", type=int, help="with --config; default: those of its cluster")
    add_writing(made)
    add_share(made)
    return made


def work(arguments: Namespace) -> None:
    check_writing(arguments)
    if arguments.config is not None:
        plan_for_configuration(arguments)
        return
    if arguments.checkpoint is None or arguments.processes is not None:
        raise OptionError("give a checkpoint, or --config (and --processes) with --dry-run")
    with executing_pickles(arguments.allow_pickle):
        merge_newest(arguments)


def merge_newest(arguments: Namespace) -> None:
    """Merge the checkpoint that the arguments name, or say what that takes."""
    tag = newest_tag(arguments.checkpoint)
    specs = merged_source(tag, model_of(read_state(tag)), arguments.dtype).specs()
    planned = plan_files(specs, arguments.max_file_bytes)
    made = estimate(planned, _read_bytes(specs), arguments.bandwidth or BANDWIDTH)
    if arguments.dry_run:
        print_estimate(f"{tag}", made, arguments.json)
        return
    if arguments.output is None:
        raise OptionError("--output: not given; the folder to write the model to")
    refuse_output_in_run(arguments.output)
    if arguments.tokenizer is not None and not has_tokenizer(arguments.tokenizer):
        raise CheckpointError(f"--tokenizer: {arguments.tokenizer} is neither a file nor a folder with a tokenizer")
    with byte_progress("merging", made.bytes) as progress:
        merge(
            tag,
            arguments.output,
            dtype=arguments.dtype,
            jobs=arguments.jobs,
            max_file_bytes=arguments.max_file_bytes,
            tokenizer=arguments.tokenizer,
            progress=progress,
            break_lock=arguments.break_lock,
        )
    print_estimate(f"{arguments.output}", made, arguments.json)


def plan_for_configuration(arguments: Namespace) -> None:
    """--config: the plan for a checkpoint that does not exist."""
    if not arguments.dry_run or arguments.checkpoint is not None or arguments.output is not None:
        raise OptionError("--config: goes with --dry-run only, without a checkpoint and --output")
    if arguments.allow_pickle:
        raise OptionError("--allow-pickle: given with --config; allowed: with a checkpoint")
    config = load_config(arguments.config, []).config
    cluster = config.cluster
    processes = arguments.processes
    if processes is None and cluster is not None:
        processes = cluster.nodes * cluster.gpus_per_node
    if processes is not None and processes < 1:
        raise OptionError(f"--processes: given {processes}; allowed: at least 1; nearest: 1")
    if processes is None:
        raise OptionError("--processes: not given, and the configuration names no cluster")
    tensors = planned_tensors(resolve(config, processes))
    dtype = torch.float32 if arguments.dtype == "float32" else torch.bfloat16
    specs = {n: TensorSpec(folder_dtype(n, s, dtype), s.shape) for n, s in expected_specs(config.model).items()}
    missing = set(specs) - set(tensors)
    if odd := sorted(name for name in missing if ".router." not in name):
        raise CheckpointError(f"{odd[0]}: in no file of the plan")
    pieces = sum(len(tiling) for tensor in tensors.values() for tiling in tensor.tilings)
    made = estimate(plan_files(specs, arguments.max_file_bytes), _read_bytes(specs), arguments.bandwidth or BANDWIDTH)
    if not arguments.json:
        sys.stdout.write(f"{pieces:,} pieces in the files of {processes:,} processes\n")
    print_estimate(arguments.config, made, arguments.json)


def _read_bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes // spec.dtype.itemsize * _FP32_BYTES for spec in specs.values())


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
