"""What a looped model does at depth: where its state goes, loss by loops, routing by loop, and when tokens could leave.

    mythos-ds loop-report --checkpoint tiny --output report
    mythos-ds loop-report --checkpoint weights.pt --openmythos-config config.json --output report

The first form takes a folder with config.json and model.safetensors; the second an OpenMythos state_dict and the fields
of its MythosConfig as JSON. Writes report.md, report.json and pictures to the output folder.
"""

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch

from mythos_ds.analysis.loop_report import DEFAULT_SEQ_LEN, ROWS, measure_all, report_text, write_report_page
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel
from mythos_ds.conversion.openmythos import read_openmythos
from mythos_ds.errors import OptionError
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.provenance import describe
from mythos_ds.weights.built_in import model_path
from mythos_ds.weights.checksums import require_whole
from mythos_ds.weights.model_folder import load_model, model_of, read_metadata


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, required=True, help="a model folder, tiny, or OpenMythos weights")
    made.add_argument("--openmythos-config", type=Path, metavar="JSON", help="what the state_dict was made with")
    made.add_argument("--output", type=Path, default=Path("loop_report"), help="where the report is written")
    made.add_argument("--batches", type=int, default=4, help=f"held-out batches of {ROWS} sequences")
    made.add_argument(
        "--seq-len", type=int, help=f"default: that of training where it is known, else {DEFAULT_SEQ_LEN}"
    )
    made.add_argument("--data-dir", type=Path, default=Path("data"), help="where the built-in corpus is, or is made")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(parser(), work, argv)


def work(arguments: Namespace) -> None:
    seq_len = arguments.seq_len
    for name, value, least in (("--batches", arguments.batches, 1), ("--seq-len", seq_len, 2)):
        if value is not None and value < least:
            raise OptionError(f"{name}: given {value}; allowed: at least {least}; nearest: {least}")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise OptionError(f"--output: given {arguments.output}, which is a file; allowed: a folder, or a new one")
    place = model_path(arguments.checkpoint)
    model = load(place, arguments.openmythos_config)
    if seq_len is None:
        known = read_metadata(place) if place.is_dir() else {}
        seq_len = known.get("seq_len", DEFAULT_SEQ_LEN)
    batches, text = report_text(model, place, arguments.data_dir, arguments.batches, seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    origin = {
        "model": f"{arguments.checkpoint}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"mean recurrence T = {model.config.mean_recurrence}",
        "tokens": f"{arguments.batches} batches of {ROWS} x {seq_len}: {text}",
        "hardware": describe(gpu_name()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_report_page(arguments.output, origin, measure_all(model, batches))
    sys.stdout.write(f"{arguments.output / 'report.md'}\n")


def load(path: Path, openmythos: Path | None) -> MythosModel:
    """The model of a folder or of OpenMythos weights. Raises CheckpointError or ConfigError."""
    if path.is_dir() or not path.exists():
        if openmythos is not None and path.is_dir():
            raise OptionError("--openmythos-config: given with a model folder; allowed: with a state_dict file only")
        require_whole(path)
        return load_model(path)
    if openmythos is None:
        raise OptionError(f"--openmythos-config: missing; a state_dict file ({path}) needs its MythosConfig as JSON")
    tensors, config, _ = read_openmythos(path, fields_file=openmythos)
    return model_of(WholeModel(tensors, config, torch.float32, ROUTER_BUFFERS), config)


if __name__ == "__main__":
    sys.exit(main())
