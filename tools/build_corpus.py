"""Builds the built-in corpus from the Python installation, with its tokenizer and token files.

Needs no network.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.data.builtin import prepare_builtin
from mythos_ds.data.corpus import DEFAULT_BYTES, build_corpus, write_corpus
from mythos_ds.mains import run_tool, tool_parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__ or "", "mythos-ds build-corpus --data-dir data")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="data.data_dir of the runs (default: data)")
    parser.add_argument("--max-bytes", type=int, default=DEFAULT_BYTES, help="size of the text (default: %(default)s)")
    parser.add_argument("--text-only", type=Path, metavar="FILE", help="write only the text, as JSONL, to FILE")
    return run_tool(parser, _build, argv)


def _build(arguments: Namespace) -> None:
    if arguments.text_only:
        documents = build_corpus(max_bytes=arguments.max_bytes)
        write_corpus(documents, arguments.text_only)
        size = sum(document.size for document in documents)
        sys.stdout.write(f"{arguments.text_only}: {len(documents):,} documents, {size:,} bytes\n")
        return
    data = prepare_builtin(arguments.data_dir, max_bytes=arguments.max_bytes)
    sys.stdout.write(f"dataset {data.prefix}\ntokenizer {data.tokenizer}\n")


if __name__ == "__main__":
    sys.exit(main())
