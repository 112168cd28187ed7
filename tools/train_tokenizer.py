"""Trains a lossless sentencepiece tokenizer on JSON, plain text, tables or Parquet files."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mythos_ds.data.inputs import FORMATS, find_inputs
from mythos_ds.data.readers import ReadOptions, read_pieces
from mythos_ds.data.tokenizer import train_tokenizer
from mythos_ds.errors import DataError
from mythos_ds.mains import run_tool, tool_parser


def main(argv: Sequence[str] | None = None) -> int:
    example = "mythos-ds train-tokenizer docs.jsonl --vocab-size 32000 --output data/tokenizer.model"
    parser = tool_parser(__doc__ or "", example)
    parser.add_argument("inputs", nargs="+", type=Path, help="files, or folders of files")
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default: %(default)s)")
    parser.add_argument(
        "--kind", choices=("bpe", "unigram"), default="bpe", help="bpe trains faster, unigram encodes faster"
    )
    parser.add_argument("--key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--format", choices=sorted(set(FORMATS.values())), help="default: by each file's ending")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=8_000_000,
        help="text to train on, from the start (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return run_tool(parser, _train, argv)


def _train(arguments: Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise DataError(
            f"{arguments.output} exists; give --overwrite to replace it, or another --output", code="MDS601"
        )
    found = find_inputs(arguments.inputs)
    sys.stderr.write(found.report())
    tokenizer = train_tokenizer(
        read_pieces(found.files, ReadOptions(key=arguments.key, file_format=arguments.format)),
        arguments.output,
        vocab_size=arguments.vocab_size,
        kind=arguments.kind,
        max_bytes=arguments.max_bytes,
    )
    pieces = f"{tokenizer.vocab_size:,} pieces"
    if tokenizer.vocab_size < arguments.vocab_size:
        pieces += f" of the {arguments.vocab_size:,} asked for (the text has no more)"
    sys.stdout.write(f"{tokenizer.path}: {pieces}, sha256 {tokenizer.sha256}\n")


if __name__ == "__main__":
    sys.exit(main())
