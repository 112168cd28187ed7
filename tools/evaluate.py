"""Loss of a model on a run's held-out text at several loop counts, with paired differences and their standard errors.

    mythos-ds evaluate runs/looped --config looped.json --loops 1 2 4 8
    mythos-ds evaluate looped --config looped.json --sequences 32 --json losses.json
    mythos-ds evaluate runs/long --config long.json --by-position 2048

The text and the length of its sequences are those of the run file (of its last training stage, or of --stage), the
same for every model, seed and loop count. The model (a folder, a run, a checkpoint or tiny) runs in one process, in
fp32. --by-position tells the loss by position in held-out documents longer than that, whatever the length the model
was trained with.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.analysis.loop_losses import as_json, held_out_sequences, loss_table, sequence_losses, text_digest
from mythos_ds.analysis.position_losses import long_documents, position_losses, position_table, positions_as_json
from mythos_ds.api import open_model
from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import RunConfig
from mythos_ds.config.training_stages import index_of
from mythos_ds.errors import OptionError
from mythos_ds.formatting import markdown_table
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.monitor.progress import piece_progress


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("model", help="a model folder, a run, a checkpoint, or tiny")
    made.add_argument("--config", required=True, help="the run file or preset whose held-out text is read")
    made.add_argument("--stage", metavar="NAME", help="the training stage whose held-out text it is; default: the last")
    made.add_argument(
        "--loops", type=int, nargs="+", help="default: 1, T, 2T and 4T for the mean of training T; by position T"
    )
    made.add_argument("--sequences", type=int, help="of the run's seq_len, or documents; default: 16, or all there are")
    made.add_argument(
        "--by-position", type=int, metavar="LENGTH", help="loss by position in held-out documents of more tokens"
    )
    made.add_argument("--json", type=Path, help="write the loss of every sequence to this file")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    return made


def work(arguments: Namespace) -> None:
    loaded = load_config(arguments.config, arguments.overrides)
    number = -1 if arguments.stage is None else index_of(arguments.stage, loaded.stages, loaded.path)
    config = loaded.stages[number].config
    model = open_model(arguments.model).float()
    if model.config.vocab_size < config.model.vocab_size:
        raise OptionError(
            f"--config: given a text of {config.model.vocab_size} pieces; allowed: at most the model's "
            f"{model.config.vocab_size}"
        )
    mean = model.config.mean_recurrence
    if arguments.by_position is not None:
        _by_position(arguments, model, config, arguments.loops or [mean])
        return
    loops = arguments.loops or [1, mean, 2 * mean, 4 * mean]
    batches = held_out_sequences(config, arguments.sequences)
    with piece_progress("sequences", sum(len(batch["tokens"]) for batch in batches)) as progress:
        losses = sequence_losses(model, batches, loops, progress)
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(as_json(losses, batches), indent=1) + "\n")
    rows = loss_table(losses)
    sys.stdout.write(markdown_table(rows[0], rows[1:]) + "\n")


def _by_position(arguments: Namespace, model: MythosModel, config: RunConfig, loops: list[int]) -> None:
    length = arguments.by_position
    batches = long_documents(config, length, arguments.sequences)
    with piece_progress("documents", len(batches)) as progress:
        losses = position_losses(model, batches, loops, progress)
    if arguments.json is not None:
        content = {"text": text_digest(batches), **positions_as_json(losses, length)}
        write_atomic(arguments.json, json.dumps(content, indent=1) + "\n")
    rows = position_table(losses, length)
    sys.stdout.write(markdown_table(rows[0], rows[1:]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
