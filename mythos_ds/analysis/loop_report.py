"""What a looped model does at depth, as one report: stability, loss by loops, routing by loop, exit rules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mythos_ds.analysis import depth_curve, exit_rule_comparison, routing, stability
from mythos_ds.data.batches import Batch
from mythos_ds.data.held_out import held_out_batches
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import has_tokenizer
from mythos_ds.formatting import markdown_table
from mythos_ds.io import write_atomic
from mythos_ds.model.mythos import MythosModel

ROWS = 4
DEFAULT_SEQ_LEN = 256

Table = list[list[str]]


def report_text(model: MythosModel, checkpoint: Path, data_dir: Path, n: int, seq_len: int) -> tuple[list[Batch], str]:
    """Batches of held-out text, or of random tokens where the vocabulary is none for text; and which it is."""
    vocab = model.config.vocab_size
    own = checkpoint if checkpoint.is_dir() else checkpoint.parent / "none"
    if has_tokenizer(own):
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


def measure_all(model: MythosModel, batches: list[Batch]) -> dict[str, Any]:
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


def write_report_page(output: Path, origin: dict[str, str], results: dict[str, Any]) -> None:
    """report.md, report.json and a picture of each part."""
    sections: dict[str, tuple[Any, Callable[[dict[str, Any]], tuple[list[str], list[Table]]]]] = {
        "stability": (stability.draw, _stability),
        "depth_curve": (depth_curve.draw, _depth_curve),
        "routing": (routing.draw, _routing),
        "halting": (exit_rule_comparison.draw, _halting),
    }
    output.mkdir(parents=True, exist_ok=True)
    lines = ["# Loop report", "", *(f"* {name}: {value}" for name, value in origin.items()), ""]
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
    write_atomic(output / "report.json", json.dumps({"facts": origin, **results}, indent=1) + "\n")
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
    fit, noise = own["fit"], own["noise"]
    sentences = [
        f"perplexity at 2T / at T: {own['ppl_ratio']:.4f}; least loss at T = {own['best_loops']}, "
        f"{own['overthinking']:.4f} above it at T = {own['loops'][-1]}; noise of a loss "
        + ("unknown (one batch)" if noise is None else f"{noise:.4f}"),
        "the curve is too flat for a law"
        if fit["too_flat"]
        else f"L(T) = {fit['L_inf']:.4f} {fit['Z']:+.4f} exp(-{fit['z']:.4f} T); a depth left out is missed by "
        f"{fit['held_out_error']:.2%} of its loss ({fit['held_out_share']:.0%} of the curve's spread)"
        + ("; z is at the bound of what is tried: the curve does not fix it" if fit["rate_at_bound"] else ""),
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
