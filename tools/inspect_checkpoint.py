"""Say what a checkpoint or a model folder holds: step, layout, sizes by part, and whether its values are healthy.

    mythos-ds inspect runs/quickstart
    mythos-ds inspect runs/quickstart/checkpoints/step_00000400 --tensors
    mythos-ds inspect tiny --json

Reads every value once, a few rows at a time. Whether the files are those that were written is another question:
mythos-ds verify answers it.
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mythos_ds.checkpoint import manifest
from mythos_ds.checkpoint.health import measure_tensor, part_of
from mythos_ds.checkpoint.portable import open_state
from mythos_ds.checkpoint.training_state import read_layout, read_state
from mythos_ds.conversion.merge import newest_tag
from mythos_ds.errors import CheckpointError, OptionError
from mythos_ds.formatting import byte_text
from mythos_ds.io import read_json
from mythos_ds.mains import run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.built_in import find_model
from mythos_ds.weights.model_folder import CONFIG
from mythos_ds.weights.reader import TensorFolder, TensorSource
from mythos_ds.weights.safe_load import executes_pickles, executing_pickles


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("path", type=Path, help="a run's directory, a checkpoint (step_<n>), a model folder, or tiny")
    made.add_argument("--tensors", action="store_true", help="list every tensor, not parts only")
    made.add_argument("--allow-pickle", action="store_true", help="let a checkpoint's files run the code they name")
    made.add_argument("--json", action="store_true", help="everything as JSON")
    return made


def work(arguments: Namespace) -> None:
    with executing_pickles(arguments.allow_pickle):
        inspect(arguments)


def inspect(arguments: Namespace) -> None:
    """Read everything and print what was found."""
    summary, sources = read(find_model(arguments.path))
    total = sum(spec.nbytes for source in sources.values() for spec in source.specs().values())
    with byte_progress("reading", total) as progress:
        health = {
            kind: {name: measure_tensor(source, name, progress) for name in source.specs()}
            for kind, source in sources.items()
        }
    if arguments.json:
        sys.stdout.write(json.dumps({**summary, "tensors": health}, indent=1) + "\n")
        return
    console = Console(soft_wrap=True)
    for name, value in summary.items():
        console.print(f"{name}: {value}", highlight=False)
    for kind, tensors in health.items():
        console.print(table(kind, tensors, arguments.tensors))
    odd = [f"{kind} of {name}" for kind, tensors in health.items() for name, m in tensors.items() if m["not_finite"]]
    console.print(f"not finite: {', '.join(odd)}" if odd else "all values are finite", highlight=False)


def read(path: Path) -> tuple[dict[str, Any], dict[str, TensorSource]]:
    """A summary of what is at `path`, and its tensors by kind. Raises CheckpointError where it is neither."""
    if (path / CONFIG).is_file():
        content = read_json(path / CONFIG)
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{path / CONFIG}: not a model folder's configuration")
        if executes_pickles():
            raise OptionError(f"--allow-pickle: given for {path}, whose weights are not pickled")
        return {"model folder": str(path), "facts": content.get("facts", {})}, {"weights": TensorFolder(path)}
    tag = newest_tag(path)
    state = read_state(tag)
    sources, updates = open_state(tag)
    summary = {
        "checkpoint": str(tag),
        "step": state.step,
        "optimizer updates": int(updates),
        "sequences read": state.consumed_samples,
        "layout": read_layout(tag),
        "bytes on disk": sum(record.size for record in manifest.read_manifest(tag).values()),
    }
    return summary, dict(sources)


def table(kind: str, tensors: Mapping[str, Mapping[str, Any]], every: bool) -> Table:
    """A row per tensor, or per part of the model."""
    made = Table(title=kind)
    for heading in ("part" if not every else "tensor", "numbers", "bytes", "rms", "largest", "zeros"):
        made.add_column(heading, justify="left" if heading in ("part", "tensor") else "right")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, measured in tensors.items():
        groups.setdefault(name if every else part_of(name), []).append(measured)
    for name, members in groups.items():
        counts = [math.prod(m["shape"]) for m in members]
        total = sum(counts)
        rms = math.sqrt(sum(m["rms"] ** 2 * n for m, n in zip(members, counts, strict=True)) / max(1, total))
        zeros = sum(m["zeros"] for m in members) / max(1, total)
        size = byte_text(sum(m["bytes"] for m in members))
        largest = max(m["largest"] for m in members)
        made.add_row(name, f"{total:,}", size, f"{rms:.3g}", f"{largest:.3g}", f"{zeros:.1%}")
    return made


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
