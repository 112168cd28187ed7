"""Train a gate that says per token what one more loop is worth, on a finished model whose weights do not change.

    mythos-ds train-gate --model tiny --output tiny-gate
    mythos-ds train-gate --model tiny --output /tmp/gate --steps 20 --seq-len 64

Reads the built-in corpus with the tokenizer in the model's folder (where there is none, with the corpus's
own), and writes a model folder whose halting is "gate".
"""

import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mythos_ds.config.schema import LOOPS
from mythos_ds.conversion.writing_options import add_break_lock
from mythos_ds.data.batches import Batch, BatchStream
from mythos_ds.data.datasets import TokenDataset
from mythos_ds.data.held_out import open_text
from mythos_ds.data.tokenizer_files import copy_tokenizer
from mythos_ds.errors import OptionError
from mythos_ds.mains import run_tool
from mythos_ds.output_lock import locked_output
from mythos_ds.train.exit_gate import explained_share, train_exit_gate, with_exit_gate
from mythos_ds.weights.built_in import find_model
from mythos_ds.weights.checksums import require_whole
from mythos_ds.weights.model_folder import CONFIG, load_model, read_metadata, save_model

_HELD_OUT_BATCHES = 8
_LEAST = {"steps": 1, "seq_len": 2, "batch": 1, "loops": 2, "seed": 0}


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, help="a folder with config.json and weights, or tiny")
    made.add_argument("--output", type=Path, required=True, help="a new folder")
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--loops", type=int, help="loops run in training; default: the model's max_loops")
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--batch", type=int, default=8, help="sequences per step")
    made.add_argument("--data-dir", type=Path, default=Path("data"), help="where the built-in corpus is or will be")
    made.add_argument("--seed", type=int, default=0, help="of the order of the text")
    add_break_lock(made)
    return made


def work(arguments: Namespace) -> None:
    check(arguments)
    with locked_output(arguments.output, "train-gate", break_lock=arguments.break_lock):
        train(arguments)


def train(arguments: Namespace) -> None:
    """Train the gate and write the model."""
    arguments.model = find_model(arguments.model)
    require_whole(arguments.model)
    model = with_exit_gate(load_model(arguments.model))
    n_loops = arguments.loops or max(model.config.max_loops, 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    text = open_text(
        arguments.data_dir,
        arguments.model,
        seq_len=arguments.seq_len,
        train_samples=arguments.steps * arguments.batch,
        valid_samples=_HELD_OUT_BATCHES * arguments.batch,
        seed=arguments.seed,
        vocab_size=model.config.vocab_size,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("gate", total=arguments.steps)
        batches = stream(text.train, arguments.batch, device)
        advance = lambda error: progress.update(task, advance=1, description=f"gate, squared error {error:.4f}")  # noqa: E731
        train_exit_gate(model, batches, steps=arguments.steps, n_loops=n_loops, lr=arguments.lr, on_step=advance)
    share = explained_share(model, stream(text.valid, arguments.batch, device), n_loops)
    gate = {name: getattr(arguments, name) for name in ("steps", "lr", "seq_len", "batch", "seed")}
    metadata = read_metadata(arguments.model) | {"gate": {**gate, "loops": n_loops, "explained_share": share}}
    copy_tokenizer(arguments.model, arguments.output)
    save_model(model, arguments.output, metadata)
    sys.stdout.write(
        f"{arguments.output}: the gate explains {share:.1%} of the variance of a loop's improvement on held-out text\n"
    )


def check(arguments: Namespace) -> None:
    """Raises ConfigError for the first wrong argument."""
    for name, least in _LEAST.items():
        given, flag = getattr(arguments, name), "--" + name.replace("_", "-")
        if given is not None and given < least:
            raise OptionError(f"{flag}: given {given}; allowed: {least} or more; nearest: {least}")
    if arguments.loops is not None and arguments.loops > LOOPS:
        raise OptionError(f"--loops: given {arguments.loops}; allowed: at most {LOOPS}; nearest: {LOOPS}")
    if not (0 < arguments.lr < math.inf):
        raise OptionError(f"--lr: given {arguments.lr}; allowed: above 0; nearest: 1e-3")
    if (arguments.output / CONFIG).exists():
        raise OptionError(f"--output: {arguments.output} holds a model; allowed: a new folder")


def stream(dataset: TokenDataset, rows: int, device: torch.device) -> Iterator[Batch]:
    for batch in BatchStream(dataset, start_sample=0, micro_batch_size=rows, dp_rank=0, dp_size=1):
        yield {name: value.to(device) for name, value in batch.items()}


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
