"""How many tokens a served model's cache holds on given GPUs, and how they can divide the model.

    mythos-ds capacity --config 100b.json --gpu h200 --gpus 16
    mythos-ds capacity --model merged --gpu h100 --gpus 8 --dtype fp8 --loops 4 16

Bytes of weights and cache are exact; --share and --reserve are what is assumed of the rest. docs/capacity.md is the
table of the presets; --page writes it.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mythos_ds.config.loader import list_presets, load_config
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.capacity import (
    MEMORY_SHARE,
    RESERVE_BYTES,
    capacity_cells,
    capacity_page,
    divisions,
    require_gpus,
    serving_capacity,
)
from mythos_ds.costs.serving import Kept, serving_notes, tensor_parallel
from mythos_ds.errors import OptionError
from mythos_ds.formatting import plain_table
from mythos_ds.hardware import read_gpu
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = 5e9
"""Parameters of the smallest preset on the page."""


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a preset or a run file")
    what.add_argument("--model", type=Path, help="a model folder")
    what.add_argument("--page", action="store_true", help="write docs/capacity.md of this checkout")
    made.add_argument("--gpu", help="h100, h200, b200, mi300x or a JSON file; default: h200")
    made.add_argument("--gpus", type=int, help="of the whole server (default: those of a node)")
    made.add_argument("--dtype", choices=("bfloat16", "fp8"), help="of matrices (default: bfloat16)")
    made.add_argument("--loops", type=int, nargs="+", help="loop counts of a server (default: the mean of training)")
    made.add_argument("--share", type=float, help=f"of a GPU's memory for the server (default: {MEMORY_SHARE})")
    made.add_argument(
        "--reserve", type=float, help=f"GB of it beside weights, cache (default: {RESERVE_BYTES / 1e9:g})"
    )
    return made


def work(arguments: Namespace) -> None:
    if arguments.page:
        options = ("gpu", "gpus", "dtype", "loops", "share", "reserve")
        if given := [name for name in options if getattr(arguments, name) is not None]:
            raise OptionError(f"--{given[0]}: given with --page; allowed: with --config or --model")
        write_atomic(ROOT / "docs" / "capacity.md", build_page())
        return
    sys.stdout.write(report(arguments))


def build_page() -> str:
    """The page for the presets of this checkout."""
    models = [(name, load_config(str(ROOT / "ds_configs" / f"{name}.json")).config.model) for name in list_presets()]
    return capacity_page([(name, model) for name, model in models if count(model) >= SMALLEST])


def count(model: ModelConfig) -> int:
    """Parameters of a model."""
    from mythos_ds.costs.params import count_parameters

    return count_parameters(model).total


def report(arguments: Namespace) -> str:
    """What the folder allows, and a line for each division of the GPUs. Raises OptionError for what there is not."""
    model, gpu = read_model(arguments), read_gpu(arguments.gpu or "h200")
    gpus = gpu.gpus_per_node if arguments.gpus is None else arguments.gpus
    require_gpus(gpu, gpus)
    share = MEMORY_SHARE if arguments.share is None else arguments.share
    reserve = RESERVE_BYTES if arguments.reserve is None else arguments.reserve * 1e9
    if not 0 < share <= 1:
        raise OptionError(f"--share: given {share:g}; allowed: 0 < number <= 1; nearest: {1 if share > 1 else 0.1:g}")
    if not 0 <= reserve < gpu.memory_bytes:
        most = gpu.memory_bytes / 1e9
        raise OptionError(f"--reserve: given {reserve / 1e9:g}; allowed: 0 <= number < {most:g}, the GPU's GB")
    loops = arguments.loops or [model.mean_recurrence]
    if min(loops) < 1:
        raise OptionError(f"--loops: given {min(loops)}; allowed: 1 or more; nearest: 1")
    kept: Kept = arguments.dtype or "bfloat16"
    found = divisions(model, gpu, gpus, fp8=kept == "fp8")
    if not found:
        limit = tensor_parallel(model, fp8=kept == "fp8", experts="whole").limit
        raise OptionError(f"--gpus {gpus} --dtype {kept}: given; no tensor-parallel size fits ({limit})")
    header = ["GPUs", "tensor x data", "weights", "for the cache", "one replica, at T"]
    header += [f"all, {n_loops} loops" for n_loops in loops]
    made = [serving_capacity(model, gpu, one, fp8=kept == "fp8", share=share, reserve=reserve) for one in found]
    rows = [capacity_cells(one, loops) for one in made]
    lines = [*serving_notes(model, loops[0], kept), plain_table(header, rows)]
    lines.append(
        f"each {gpu.name} of {gpu.memory_bytes / 1e9:g} GB; {share:.0%} of it, less {reserve / 1e9:g} GB beside "
        "weights and cache (assumptions); run on no GPU"
    )
    return "\n".join([*lines, ""])


def read_model(arguments: Namespace) -> ModelConfig:
    """The model of a configuration or a folder."""
    if arguments.model is None:
        return load_config(arguments.config).config.model
    # Torch, which a configuration need not wait for.
    from mythos_ds.weights.built_in import model_path
    from mythos_ds.weights.model_folder import read_config

    return read_config(model_path(arguments.model))


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
