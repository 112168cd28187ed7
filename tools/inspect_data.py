"""Shows what an indexed dataset holds: documents, tokens, lengths, boundaries and decoded text."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

import numpy as np

from mythos_ds.data.inspection import Boundaries, DatasetView, LengthBin, length_histogram, save_histogram
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError
from mythos_ds.mains import run_tool, tool_parser

_BAR_WIDTH = 40


def main(argv: Sequence[str] | None = None) -> int:
    example = "mythos-ds inspect-data data/builtin/tokens --tokenizer data/builtin/tokenizer.model"
    parser = tool_parser(__doc__ or "", example)
    parser.add_argument("prefix", type=Path, help="path of the dataset without ending")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's file or folder, to show text")
    parser.add_argument(
        "--document", type=int, nargs="+", default=[0], metavar="N", help="documents to show (default: 0)"
    )
    parser.add_argument("--tokens", type=int, default=120, help="tokens shown of each (default: %(default)s)")
    parser.add_argument("--boundaries", action="store_true", help="check the end of every document (reads all tokens)")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="draw the document lengths (needs matplotlib)")
    return run_tool(parser, _inspect, argv)


def _inspect(arguments: Namespace) -> None:
    view = DatasetView(arguments.prefix)
    if arguments.boundaries and view.info.is_chat:
        raise DataError(
            f"--boundaries: {view.prefix} holds conversations, which end as their template does; remove it",
            code="MDS120",
        )
    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    bins = length_histogram(view.lengths)
    out = sys.stdout
    if isinstance(out, TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # text of any language, on a terminal of any
    out.write(_summary(view) + "\n" + _bars(bins))
    if arguments.boundaries:
        out.write("\n" + _boundaries(view.boundaries(), view.info.eos_id))
    for number in arguments.document:
        out.write("\n" + _document(view, number, tokenizer, arguments.tokens))
    if arguments.histogram:
        save_histogram(bins, arguments.histogram, f"{arguments.prefix.name}: {len(view.lengths):,} documents")
        out.write(f"\nhistogram  {arguments.histogram}\n")


def _summary(view: DatasetView) -> str:
    info, lengths = view.info, view.lengths
    order = "input order" if info.shuffle_seed is None else f"shuffled with seed {info.shuffle_seed}"
    counted = f", {info.counted_tokens:,} of them the assistant's" if info.is_chat else ""
    rows = {
        "dataset": view.prefix,
        "sources": ", ".join(info.sources) or "not recorded",
        "chats" if info.is_chat else "documents": f"{info.documents:,}, {order}",
        "tokens": f"{info.tokens:,} as {view.dtype}{counted}",
        "text": f"{info.text_bytes:,} bytes, {info.text_bytes / info.tokens:.2f} per token",
        "vocabulary": f"{info.vocab_size:,} pieces, tokenizer sha256 {info.tokenizer_sha256[:12]}",
        "length": f"mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, max {np.max(lengths)} tokens",
    }
    return "".join(f"{name:<11}{value}\n" for name, value in rows.items())


def _bars(bins: list[LengthBin]) -> str:
    most = max(b.documents for b in bins)
    lines = [f"{'tokens from':>12} {'documents':>10} {'tokens':>14}"]
    for b in bins:
        bar = "#" * round(_BAR_WIDTH * b.documents / most)
        lines.append(f"{b.low:>12,} {b.documents:>10,} {b.tokens:>14,} {bar}".rstrip())
    return "\n".join(lines) + "\n"


def _boundaries(found: Boundaries, eos_id: int) -> str:
    if found.sound:
        verdict = f"all {found.documents:,} documents end with id {eos_id} and have it nowhere else"
    else:
        verdict = f"id {eos_id} does not end {found.without_end:,} documents, is inside {found.with_inner_end:,}"
    return f"boundaries {verdict}\nlargest id {found.largest_id:,}\n"


def _document(view: DatasetView, number: int, tokenizer: Tokenizer | None, limit: int) -> str:
    ids = view.document(number)
    head = f"document {number}: {len(ids):,} tokens\n"
    if tokenizer is None:
        return head + " ".join(map(str, ids[:limit])) + "\n"
    return head + view.text(number, tokenizer, limit=limit) + "\n"


if __name__ == "__main__":
    sys.exit(main())
