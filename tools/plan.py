"""Plan a run before renting the machines: memory, traffic, time and cost per GPU, and which layouts fit.

    mythos-ds plan --config 1t.json
    mythos-ds plan --config 1t.json --gpus 1024 --gpu h100 --tokens 10T --picture plan.png
    mythos-ds plan --config 100b.json --objective memory --write chosen.json
    mythos-ds plan --config 10b.json --compare
    mythos-ds plan --config 1t.json --json parallel.ep_size=512

Memory comes from the model's own code, run without data on the meta device; docs/calibration.md says how close that is.
Of a file with training stages, what each needs and what they cost together; a layout must fit all of them.
Times are bounds from data-sheet rates, not measurements. --gpu also takes a JSON file with the fields of a GPU.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve_stages
from mythos_ds.config.training_stages import STAGES, TrainingStage, given_file
from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.hardware import Gpu
from mythos_ds.io import where_searched, write_atomic
from mythos_ds.mains import run_tool
from mythos_ds.plan.machine import machine, require_own_length

if TYPE_CHECKING:
    from rich.console import Console

    from mythos_ds.plan.layouts import Layout

_SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--config", required=True)
    made.add_argument("--gpus", type=int, help="default: those of the configuration's cluster")
    made.add_argument("--gpu", help="h100, h200, b200, mi300x or a JSON file; default: the cluster's")
    made.add_argument("--tokens", help="of a run without training stages, such as 10T; default: the configuration's")
    made.add_argument("--objective", choices=("time", "memory"), help="also rank layouts, by this")
    made.add_argument("--layouts", type=int, default=4, help="how many to rank (with --objective)")
    made.add_argument("--compare", action="store_true", help="set it beside a dense and a plain MoE model")
    made.add_argument("--write", type=Path, help="write a runnable configuration with the best layout")
    made.add_argument("--picture", type=Path, help="write a PNG")
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    stages = load_config(arguments.config, arguments.overrides).stages
    configs = [stage.config for stage in stages]
    if arguments.layouts < 1:
        raise OptionError(f"--layouts: given {arguments.layouts}; allowed: 1 or more; nearest: 1")
    gpus, gpu = machine(configs[0], arguments.gpus, arguments.gpu)
    _require_files(arguments)
    tokens = read_tokens(arguments.tokens) if arguments.tokens else None
    require_own_length("--tokens", arguments.tokens, stages)
    if arguments.objective is None:
        resolve_stages(stages, gpus)
    # Torch, which wrong arguments need not wait for.
    from rich.console import Console

    from mythos_ds.plan.layouts import examine_stages, ranked
    from mythos_ds.plan.report import draw, print_run
    from mythos_ds.plan.run_plan import plan_numbers

    others: list[tuple[Layout, ...]] = []
    if arguments.objective is not None:
        with Console(stderr=True).status("looking at layouts"):
            others = ranked(configs, gpus, gpu, arguments.objective, most=arguments.layouts)
    try:
        layouts = examine_stages(configs, gpus, gpu)
    except ConfigError:
        if not others:
            raise
        layouts = others[0]  # the file's own layout is for another number of GPUs
    numbers, remedy = plan_numbers(layouts, stages, gpu, tokens, others)
    if arguments.compare:
        add_comparison(numbers, layouts)
    if arguments.json:
        sys.stdout.write(json.dumps(numbers, indent=1) + "\n")
    else:
        console = Console()
        print_run(console, arguments.config, numbers)
        if arguments.compare:
            print_comparisons(console, numbers)
    if arguments.picture is not None:
        draw(arguments.config, numbers, arguments.picture)
    if arguments.write is not None:
        kind = arguments.gpu if arguments.gpu or configs[0].cluster is None else configs[0].cluster.gpu
        best = others[0] if others else layouts if numbers["fits"] else remedy
        write(arguments.write, stages, best, gpus, gpu, kind)


def add_comparison(numbers: dict[str, Any], layouts: "Sequence[Layout]") -> None:
    """Sets the run beside other models, in each training stage at its own length and depth."""
    from mythos_ds.plan.compare import comparison

    for part, layout in zip(numbers.get("stages", [numbers]), layouts, strict=True):
        part["comparison"] = comparison(layout.resolved)


def print_comparisons(console: "Console", numbers: dict[str, Any]) -> None:
    from mythos_ds.plan.compare import print_comparison

    for part in numbers.get("stages", [numbers]):
        if "name" in part:
            console.print(f"\ntraining stage {part['name']}:")
        print_comparison(console, part["comparison"])


def read_tokens(text: str) -> float:
    """'10T' -> 1e13. Raises ConfigError for anything else than a number above 0 and a suffix."""
    number, factor = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise OptionError(f"--tokens: given {text}; allowed: a number above 0 with {', '.join(_SUFFIXES)} or nothing")
    return value


def _require_files(arguments: Namespace) -> None:
    if arguments.picture is not None and arguments.picture.suffix != ".png":
        raise OptionError(f"--picture: given {arguments.picture}; allowed: a name that ends in .png")
    for option, path in (("--picture", arguments.picture), ("--write", arguments.write)):
        _require_file(option, path)


def _require_file(option: str, path: Path | None) -> None:
    """Before minutes of planning: raises ConfigError for what no file can be written to."""
    if path is not None and path.is_dir():
        raise OptionError(f"{option}: given {path}, a folder; allowed: a file, such as {path / 'plan.json'}")
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"{option}: given {path}; its folder does not exist{where_searched(path)}")


def write(
    path: Path,
    stages: Sequence[TrainingStage],
    chosen: "Sequence[Layout] | None",
    gpus: int,
    gpu: Gpu,
    kind: str,
) -> None:
    """The configuration with the best layout of those that were looked at. Raises ConfigError where none fits."""
    if chosen is None:
        raise OptionError(f"--write: nothing that was looked at fits {gpus} {gpu.name}; give --objective")
    from mythos_ds.plan.layouts import with_changes

    made = given_file(
        [
            TrainingStage(stage.name, with_changes(stage.config, layout.changes))
            for stage, layout in zip(stages, chosen, strict=True)
        ]
    )
    listed = made.pop(STAGES, None)
    made.pop("cluster", None)
    per_node = min(gpus, gpu.gpus_per_node)
    if gpus % per_node == 0:
        made["cluster"] = {"gpu": kind, "nodes": gpus // per_node, "gpus_per_node": per_node}
    if listed is not None:
        made[STAGES] = listed
    write_atomic(path, json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
