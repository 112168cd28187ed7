"""Convert a model between mythos, Hugging Face and OpenMythos.

    mythos-ds convert --from mythos --to hf --input tiny --output hf
    mythos-ds convert --from mythos --to hf --input tiny --output fp8 --dtype fp8 --evaluate
    mythos-ds convert --from openmythos --to mythos --input weights --output imported
    mythos-ds convert --from hf --to mythos --input llama --output looped \\
        --prelude 4 --recurrent 6 --coda 4

Tensors are read a few rows at a time; the same command goes on after an interruption. The last form cuts a dense model
(llama, mistral, qwen2, qwen3, olmo2, smollm) into prelude, recurrent block and coda, and makes mixtures of experts of
the block's feed-forwards. docs/convert.md says what is exact. --dry-run prints what would be written, and writes
nothing.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.conversion.convert import CUT_FLAGS, DTYPES, FORMATS, Request, Route, made_from, plan_route
from mythos_ds.conversion.estimate import Estimate, estimate, print_estimate
from mythos_ds.conversion.writing_options import BANDWIDTH, add_writing, check_input, check_writing
from mythos_ds.conversion.written_model import refuse_input, write_model
from mythos_ds.errors import OptionError
from mythos_ds.mains import run_tool
from mythos_ds.monitor.progress import byte_progress
from mythos_ds.weights.built_in import model_path
from mythos_ds.weights.writer import plan_files, require_own


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--from", dest="source", choices=FORMATS, required=True, help="format of the input")
    made.add_argument("--to", dest="target", choices=FORMATS, required=True, help="format of the output")
    made.add_argument("--input", type=Path, required=True, help="a model folder, or tiny; of OpenMythos also a file")
    made.add_argument("--output", type=Path, required=True, help="a new folder")
    made.add_argument("--dtype", choices=DTYPES, help="of matrices; default: bfloat16 to hf, else as in the input")
    made.add_argument("--with-remote-code", action="store_true", help="to hf: add the model's code and auto_map")
    made.add_argument("--evaluate", action="store_true", help="to hf: measure what the conversion costs in perplexity")
    made.add_argument("--data-dir", type=Path, help="with --evaluate: where the built-in corpus is, or is made (data)")
    made.add_argument("--allow-pickle", action="store_true", help="let a pickled input run the code it names")
    add_writing(made)
    cut = made.add_argument_group("cutting a dense model (--from hf --to mythos)")
    for name, text in CUT_FLAGS.items():
        cut.add_argument("--" + name.replace("_", "-"), type=float if name == "decay" else int, help=text)
    cut.add_argument("--text", type=Path, help="a text that shows the attention sink (default: two sentences)")
    return made


def work(arguments: Namespace) -> None:
    arguments.input = model_path(arguments.input)
    check(arguments)
    given = {name: getattr(arguments, name) for name in CUT_FLAGS if getattr(arguments, name) is not None}
    request = Request(
        arguments.source,
        arguments.target,
        arguments.input,
        arguments.dtype,
        with_remote_code=arguments.with_remote_code,
        allow_pickle=arguments.allow_pickle,
        cut=given,
        text=arguments.text,
    )
    route = plan_route(request)
    if route.inspect is not None:
        route.notes.extend(route.inspect())
    files = plan_files(route.source.specs(), arguments.max_file_bytes)
    made = estimate(files, route.read_bytes, arguments.bandwidth or BANDWIDTH)
    rows = None
    if not arguments.dry_run:
        if arguments.input.is_dir():
            check_input(arguments.input)
        require_own(route.source, arguments.output, arguments.max_file_bytes)
        with byte_progress("converting", made.bytes) as progress:
            write_model(
                route.source,
                arguments.output,
                route.finish,
                command="convert",
                made_from=made_from(request, route),
                jobs=arguments.jobs,
                max_file_bytes=arguments.max_file_bytes,
                progress=progress,
                break_lock=arguments.break_lock,
            )
        if arguments.evaluate and route.evaluate is not None:
            rows = route.evaluate(arguments.output, arguments.data_dir or Path("data"))
    report(arguments, route, made, rows)


def check(arguments: Namespace) -> None:
    """Raises ConfigError for arguments that do not fit together, or without effect."""
    check_writing(arguments)
    if arguments.data_dir is not None and not arguments.evaluate:
        raise OptionError("--data-dir: given without --evaluate; allowed: with it")
    if arguments.evaluate and arguments.target != "hf":
        raise OptionError(f"--evaluate: given with --to {arguments.target}; allowed: with --to hf")
    if arguments.evaluate and arguments.dry_run:
        raise OptionError("--evaluate: given with --dry-run, which writes nothing to measure; allowed: without it")
    refuse_input(arguments.output, [arguments.input])


def report(arguments: Namespace, route: Route, made: Estimate, rows: Sequence[dict[str, float]] | None) -> None:
    """What was, or would be, written, and what it costs."""
    if arguments.json:
        result: dict[str, Any] = {
            "from": arguments.source,
            "to": arguments.target,
            "dtype": route.dtype,
            "notes": route.notes,
            "written": not arguments.dry_run,
            "estimate": asdict(made),
            "evaluation": rows,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write("".join(f"{note}\n" for note in route.notes))
    print_estimate(f"{arguments.output}{' (nothing written)' if arguments.dry_run else ''}", made, False)
    if arguments.target == "hf":
        sys.stdout.write(hf_notes(arguments, route))
    for row in rows or ():
        before, after, change = row["before"], row["after"], row["change"]
        sys.stdout.write(f"{row['loops']} loops: perplexity {before:.4f} before, {after:.4f} after ({change:+.3%})\n")


def hf_notes(arguments: Namespace, route: Route) -> str:
    """In which type the matrices are, and what transformers needs to open the folder."""
    kept = "" if route.dtype == "float32" else "; --dtype float32 keeps the logits"
    lines = [f"matrices in {route.dtype}{'' if arguments.dtype else ', the default'}{kept}"]
    if not arguments.with_remote_code:
        lines.append("transformers opens it after `import mythos_hf`; without that package: --with-remote-code")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
