"""Make a looped model of a dense one, and the run file that trains it, with the settings that were measured to help.

    mythos-ds loop-from-dense SmolLM2-135M --output looped --like tiny.json
    mythos-ds pretrain --config looped.json --processes 2

Cuts a dense model (see `mythos-ds convert`) into prelude, recurrent block and coda, the layer that makes the attention
sink in the prelude, with A = 0.05 and the feed-forwards as they are; writes the model's folder, and beside it a full
run file: that of --like for where and on what it runs, the recipe of docs/convert.md for how. The data of --like are
read with the model's tokenizer; --data names others, prepared with it.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.config.loader import load_config
from mythos_ds.conversion.attention_sink import search_sink
from mythos_ds.conversion.convert import CUT_FLAGS, Request, Route, plan_route
from mythos_ds.conversion.dense_source import hf_weights
from mythos_ds.conversion.init_config import file_text, init_config
from mythos_ds.conversion.recipe import choose_cut, dense_config, recipe_cut, recipe_overrides
from mythos_ds.conversion.writing_options import add_break_lock, check_input
from mythos_ds.conversion.written_model import refuse_input, write_model
from mythos_ds.errors import OptionError
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.model_folder import read_config

_PARTS = ("prelude", "recurrent", "coda")


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="a Hugging Face folder of a dense model")
    made.add_argument("--output", type=Path, required=True, help="a new folder, for the looped model")
    made.add_argument("--like", required=True, help="a run file or a preset: layout, data, checkpoints, monitoring")
    made.add_argument("--config", type=Path, help="the run file to write (default: OUTPUT.json)")
    made.add_argument("--data", type=Path, action="append", default=[], help="prefix of prepared data; may be repeated")
    made.add_argument("--text", type=Path, help="a text that shows the attention sink (default: two sentences)")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="of matrices; default: as in the input")
    made.add_argument("--allow-pickle", action="store_true", help="let a pickled input run the code it names")
    add_break_lock(made)
    for name, text in CUT_FLAGS.items():
        words = text.partition(" (default")[0].partition("; default")[0]
        made.add_argument("--" + name.replace("_", "-"), type=float if name == "decay" else int, help=words)
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the run file")
    return made


def work(arguments: Namespace) -> None:
    like = load_config(arguments.like)  # a mistake in it is said before anything is written
    route = planned(arguments)
    check_input(arguments.folder)
    with byte_progress("converting", route.read_bytes) as progress:
        write_model(
            route.source,
            arguments.output,
            route.finish,
            command="loop-from-dense",
            made_from=arguments.folder.resolve().name,
            progress=progress,
            break_lock=arguments.break_lock,
        )
    settings = [*recipe_overrides(read_config(arguments.output)), *arguments.overrides]
    run, notes = init_config(arguments.output, like, settings, data=arguments.data)
    file = run_file(arguments)
    write_atomic(file, file_text(run))
    sys.stdout.write("".join(f"{note}\n" for note in (*route.notes, *notes)))
    sys.stdout.write(f"{arguments.output}: the model; {file}: its run file\n")
    sys.stdout.write(f"train it: mythos-ds pretrain --config {file} --processes 2\n")


def planned(arguments: Namespace) -> Route:
    """The conversion, with the cut chosen where it is not given, and what there is to say of it."""
    output, file = arguments.output, run_file(arguments)
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output: given {output}, which is a file; allowed: a new folder")
    refuse_input(output, [arguments.folder, file])
    if file.exists():
        raise OptionError(f"--config: given {file}, which exists; allowed: a new file")
    given = {name: getattr(arguments, name) for name in CUT_FLAGS if getattr(arguments, name) is not None}
    parts = {name: given[name] for name in _PARTS if name in given}
    if 0 < len(parts) < len(_PARTS):
        missing = next(name for name in _PARTS if name not in parts)
        raise OptionError(f"--{missing}: not given; give all of --prelude, --recurrent and --coda, or none of them")
    hf = dense_config(arguments.folder)
    weights = hf_weights(arguments.folder, allow_pickle=arguments.allow_pickle)
    sink = search_sink(weights, hf, arguments.folder, parts.get("coda", 0), arguments.text)
    cut = recipe_cut(given, parts or choose_cut(int(hf["num_hidden_layers"]), sink))
    request = Request(
        "hf",
        "mythos",
        arguments.folder,
        arguments.dtype,
        allow_pickle=arguments.allow_pickle,
        cut=cut,
        text=arguments.text,
        sink=sink,
    )
    route = plan_route(request)
    if route.inspect is not None:
        route.notes.extend(route.inspect())
    return route


def run_file(arguments: Namespace) -> Path:
    """Where the run file is written."""
    given: Path | None = arguments.config
    return given or arguments.output.with_name(f"{arguments.output.name}.json")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
