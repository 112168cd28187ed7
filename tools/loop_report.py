"""What a looped model does at depth: where its state goes, loss by loops, routing by loop, and when tokens could leave.

    mythos-ds loop-report --checkpoint models/tiny --output report
    mythos-ds loop-report --checkpoint weights.pt --openmythos-config config.json --output report

The first form takes a folder with config.json and model.safetensors; the second an OpenMythos state_dict and the fields
of its MythosConfig as JSON. Writes report.md, report.json and pictures to the output folder.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mythos_ds.analysis import depth_curve, exit_rule_comparison, routing, stability
from mythos_ds.conversion.model_target import ROUTER_BUFFERS, WholeModel
from mythos_ds.conversion.openmythos import read_openmythos
from mythos_ds.data.held_out import held_out_batches
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import ConfigError
from mythos_ds.formatting import markdown_table
from mythos_ds.io import write_atomic
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.monitor.throughput import gpu_name
from mythos_ds.provenance import describe
from mythos_ds.weights.model_folder import TOKENIZER, load_model, model_of, read_metadata

ROWS = 4
_SEQ_LEN = 256

Batches = list[dict[str, Tensor]]
Table = list[list[str]]


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, required=True, help="a model folder, or an OpenMythos state_dict")
    made.add_argument("--openmythos-config", type=Path, metavar="JSON", help="what the state_dict was made with")
    made.add_argument("--output", type=Path, default=Path("loop_report"), help="where the report is written")
    made.add_argument("--batches", type=int, default=4, help=f"held-out batches of {ROWS} sequences")
    made.add_argument("--seq-len", type=int, help=f"default: that of training where it is known, else {_SEQ_LEN}")
    made.add_argument("--data-dir", type=Path, default=Path("data"), help="where the built-in corpus is, or is made")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(parser(), work, argv)


def work(arguments: Namespace) -> None:
    seq_len = arguments.seq_len
    for name, value, least in (("--batches", arguments.batches, 1), ("--seq-len", seq_len, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{name}: given {value}; allowed: at least {least}; nearest: {least}")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ConfigError(f"--output: given {arguments.output}, which is a file; allowed: a folder, or a new one")
    model = load(arguments.checkpoint, arguments.openmythos_config)
    if seq_len is None:
        known = read_metadata(arguments.checkpoint) if arguments.checkpoint.is_dir() else {}
        seq_len = known.get("seq_len", _SEQ_LEN)
    batches, text = held_out(model, arguments.checkpoint, arguments.data_dir, arguments.batches, seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    facts = {
        "model": f"{arguments.checkpoint}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"mean recurrence T = {model.config.mean_recurrence}",
        "tokens": f"{arguments.batches} batches of {ROWS} x {seq_len}: {text}",
        "hardware": describe(gpu_name()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write(arguments.output, facts, measure_all(model, batches))
    sys.stdout.write(f"{arguments.output / 'report.md'}\n")


def load(path: Path, openmythos: Path | None) -> MythosModel:
    """The model of a folder or of OpenMythos weights. Raises CheckpointError or ConfigError."""
    if path.is_dir() or not path.exists():
        if openmythos is not None and path.is_dir():
            raise ConfigError("--openmythos-config: given with a model folder; allowed: with a state_dict file only")
        return load_model(path)
    if openmythos is None:
        raise ConfigError(f"--openmythos-config: missing; a state_dict file ({path}) needs its MythosConfig as JSON")
    tensors, config, _ = read_openmythos(path, fields_file=openmythos)
    return model_of(WholeModel(tensors, config, torch.float32, ROUTER_BUFFERS), config)


def held_out(model: MythosModel, checkpoint: Path, data_dir: Path, n: int, seq_len: int) -> tuple[Batches, str]:
    """Batches of held-out text, or of random tokens where the vocabulary is none for text; and which it is."""
    vocab = model.config.vocab_size
    own = checkpoint / TOKENIZER if checkpoint.is_dir() else checkpoint.parent / "none"
    if own.is_file():
        note = "held-out part of the built-in corpus, in the model's tokenizer"
        fits = Tokenizer.load(own).vocab_size <= vocab
    else:
        note = "held-out part of the built-in corpus; **the model brings no tokenizer, the corpus's is assumed**"
        fits = vocab >= _builtin_vocabulary(data_dir)
    if not fits:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocab, (n, ROWS, seq_len + 1), generator=generator)
        positions = torch.arange(seq_len).expand(ROWS, -1)
        batches = [{"tokens": b[:, :-1], "targets": b[:, 1:], "positions": positions} for b in drawn]
        return batches, f"**random tokens, since the vocabulary of {vocab} holds no text; losses mean nothing**"
    batches, tokenizer = held_out_batches(data_dir, own, rows=ROWS, batches=n, seq_len=seq_len, vocab_size=vocab)
    for batch in batches:
        batch["classes"] = exit_rule_comparison.token_classes(tokenizer, batch["tokens"])
    return batches, note


def _builtin_vocabulary(data_dir: Path) -> int:
    from mythos_ds.data.builtin import VOCABULARY, BuiltinData

    tokenizer = BuiltinData.under(data_dir).tokenizer
    return Tokenizer.load(tokenizer).vocab_size if tokenizer.is_file() else VOCABULARY


def measure_all(model: MythosModel, batches: Batches) -> dict[str, Any]:
    """Every inspection's result by name."""
    trained = model.config.mean_recurrence
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "stability": lambda: stability.measure(model, batches),
        "depth_curve": lambda: depth_curve.measure(model, batches),
        "routing": lambda: routing.measure(model, batches),
    }
    results: dict[str, Any] = {}
    if model.recurrent.halting is None:
        parts["halting"] = lambda: exit_rule_comparison.measure(model, batches, 2 * trained)
    else:
        results["halting"] = {"not_measured": f"exit rules are for models without ACT ({model.config.halting})"}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(parts))
        for name, run in parts.items():
            progress.update(task, description=name)
            results[name] = run()
            progress.advance(task)
    return results


def write(output: Path, facts: dict[str, str], results: dict[str, Any]) -> None:
    """report.md, report.json and a picture of each part."""
    sections: dict[str, tuple[Any, Callable[[dict[str, Any]], tuple[list[str], list[Table]]]]] = {
        "stability": (stability.draw, _stability),
        "depth_curve": (depth_curve.draw, _depth_curve),
        "routing": (routing.draw, _routing),
        "halting": (exit_rule_comparison.draw, _halting),
    }
    output.mkdir(parents=True, exist_ok=True)
    lines = ["# Loop report", "", *(f"* {name}: {value}" for name, value in facts.items()), ""]
    for name, (draw, words) in sections.items():
        own = results[name]
        lines += [f"## {name.replace('_', ' ').capitalize()}", ""]
        if "not_measured" in own:
            lines += [f"Not measured: {own['not_measured']}.", ""]
            continue
        sentences, tables = words(own)
        lines += [*(f"* {sentence}" for sentence in sentences), ""]
        lines += [line for table in tables for line in (markdown_table(table[0], table[1:]), "")]
        draw(own, output / f"{name}.png")
        lines += [f"![{name.replace('_', ' ')}]({name}.png)", ""]
    write_atomic(output / "report.json", json.dumps({"facts": facts, **results}, indent=1) + "\n")
    write_atomic(output / "report.md", "\n".join(lines))


def _stability(own: dict[str, Any]) -> tuple[list[str], list[Table]]:
    shares, limits, growth = own["shares"], own["thresholds"], own["growth"]
    sentences = [
        f"trajectory: **{own['trajectory']}**; tokens after {own['loops'][-1]} loops: "
        + ", ".join(f"{share:.1%} {kind}" for kind, share in shares.items())
        + f" (settle: relative residual below {limits['settled']:g}; cycle: back within {limits['returned']:g} of the "
        f"residual after 2 to {limits['longest_period']} loops; drift: neither)",
        f"rho(A) = {own['spectral_radius_A']:.4f}; per loop, a perturbation grows by {growth['rate']:.4f} (2nd half) "
        f"and the median residual by {own['contraction']:.4f} (from T to 2T)",
    ]
    norms = dict(zip(own["jacobian"]["loops"], own["jacobian"]["norm"], strict=True))
    rows = [["loop", "rms", "median residual", "cosine", "growth", "norm of J"]]
    for loop in _chosen(own):
        at = loop - 1
        values = (own["state_rms"][at], own["residual"]["0.5"][at], own["cosine"][at], growth["by_loop"][at])
        rows.append([str(loop), *(f"{value:.4g}" for value in values), f"{norms[loop]:.4g}" if loop in norms else ""])
    return sentences, [rows]


def _chosen(own: dict[str, Any]) -> list[int]:
    """Loops that a table shows: 1, 2, 4, ... and T, 2T, 4T, 8T."""
    last, trained = own["loops"][-1], own["trained"]
    chosen = {2**i for i in range(last.bit_length())} | {trained * factor for factor in (1, 2, 4, 8)}
    return sorted(loop for loop in chosen if loop <= last)


def _depth_curve(own: dict[str, Any]) -> tuple[list[str], list[Table]]:
    law, noise = own["fit"], own["noise"]
    sentences = [
        f"perplexity at 2T / at T: {own['ppl_ratio']:.4f}; least loss at T = {own['best_loops']}, "
        f"{own['overthinking']:.4f} above it at T = {own['loops'][-1]}; noise of a loss "
        + ("unknown (one batch)" if noise is None else f"{noise:.4f}"),
        "the curve is too flat for a law"
        if law["too_flat"]
        else f"L(T) = {law['L_inf']:.4f} {law['Z']:+.4f} exp(-{law['z']:.4f} T); a depth left out is missed by "
        f"{law['held_out_error']:.2%} of its loss ({law['held_out_share']:.0%} of the curve's spread)"
        + ("; z is at the bound of what is tried: the curve does not fix it" if law["rate_at_bound"] else ""),
    ]
    pairs = zip(own["loops"], own["loss"], strict=True)
    return sentences, [[["loops", "loss"], *([str(n), f"{loss:.4f}"] for n, loss in pairs)]]


def _routing(own: dict[str, Any]) -> tuple[list[str], list[Table]]:
    sentences, tables = [], []
    for number, layer in enumerate(own["layers"]):
        last = layer["loops"][-1]
        sentences.append(
            f"layer {number}: between loops 1 and {last}, {layer['same_set']:.1%} of the tokens keep all experts and "
            f"{layer['disjoint_set']:.1%} none; overlap {layer['overlap'][0][-1]:.3f}, with another token "
            f"{layer['overlap_other_token'][0][-1]:.3f}, of random sets {layer['overlap_random'][0][-1]:.3f}"
        )
        rows = [["loop", "max / mean", "dead", "entropy of mean", "mean entropy", "moved by bias", "as in loop 1"]]
        names = ("max_over_mean", "dead_experts", "entropy_of_mean", "mean_entropy", "moved_by_bias")
        for at, loop in enumerate(layer["loops"]):
            values = [*(layer[name][at] for name in names), layer["overlap"][0][at]]
            rows.append([str(loop), *(f"{value:.3g}" for value in values)])
        tables.append(rows)
    return sentences, tables


def _halting(own: dict[str, Any]) -> tuple[list[str], list[Table]]:
    sentences = [f"loss at equal mean depth, of at most {own['n_loops']} loops; oracle: the best any rule could do"]
    head = ["rule", *(f"{depth:g}" for depth in own["depths"])]
    rows = [
        [name.replace("_", " "), *("" if loss is None else f"{loss:.4f}" for loss in rule["loss"])]
        for name, rule in own["rules"].items()
    ]
    return sentences, [[head, *rows]]


if __name__ == "__main__":
    sys.exit(main())
