"""Turns JSONL, plain text, Parquet or a Hugging Face dataset into an indexed dataset (.bin, .idx, .json)."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from mythos_ds.data.dataset_info import DatasetInfo
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import find_inputs, limited, read_files, read_hub
from mythos_ds.errors import DataError
from mythos_ds.mains import counted_progress, run_tool, tool_parser

EXAMPLE = """mythos-ds prepare-data docs.jsonl --tokenizer data/tokenizer.model --output data/docs
  mythos-ds prepare-data --hf HuggingFaceFW/fineweb-edu --hf-config sample-10BT --max-documents 100000
  \\
      --tokenizer data/tokenizer.model --output data/fineweb"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__ or "", EXAMPLE)
    parser.add_argument("inputs", nargs="*", type=Path, help="files, or folders of files (.jsonl .txt .parquet, .gz)")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a file (sentencepiece, tokenizer.json, tiktoken) or its folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="path of the dataset without ending")
    _add_source_arguments(parser)
    parser.add_argument("--max-documents", type=int, help="stop after that many documents")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: the cores, %(default)s here)",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle-seed", type=int, default=0, help="order of the documents (default: 0)")
    order.add_argument("--keep-order", action="store_true", help="do not shuffle; the validation part is then the end")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return run_tool(parser, _prepare, argv)


def _add_source_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--format", choices=("jsonl", "text", "parquet"), help="default: by each file's ending")
    parser.add_argument(
        "--text-documents",
        choices=("file", "paragraph"),
        default="file",
        help="a plain text file is one document (default), or one per paragraph, cut at blank lines",
    )
    parser.add_argument("--hf", metavar="NAME", help="Hugging Face dataset, or a folder that save_to_disk wrote")
    parser.add_argument("--hf-config", metavar="CONFIG", help="its configuration")
    parser.add_argument("--hf-split", default="train", help="its split (default: train)")
    parser.add_argument("--hf-download", action="store_true", help="download it whole instead of streaming")


def _prepare(arguments: Namespace) -> None:
    documents, sources = _documents(arguments)
    with counted_progress("tokenising", arguments.max_documents) as update:
        info = prepare_dataset(
            limited(documents, arguments.max_documents),
            tokenizer_path=arguments.tokenizer,
            prefix=arguments.output,
            workers=arguments.workers,
            shuffle_seed=None if arguments.keep_order else arguments.shuffle_seed,
            overwrite=arguments.overwrite,
            sources=sources,
            on_progress=update,
        )
    sys.stdout.write(_report(arguments.output, info))


def _documents(arguments: Namespace) -> tuple[Iterator[str], list[str]]:
    if bool(arguments.inputs) == bool(arguments.hf):
        raise DataError("give either input files or --hf NAME")
    if arguments.hf:
        rows = read_hub(
            arguments.hf,
            config=arguments.hf_config,
            split=arguments.hf_split,
            key=arguments.key,
            streaming=not arguments.hf_download,
        )
        return rows, [f"hf:{arguments.hf}/{arguments.hf_config or 'default'}/{arguments.hf_split}"]
    paths = find_inputs(arguments.inputs)
    documents = read_files(
        paths, key=arguments.key, file_format=arguments.format, text_documents=arguments.text_documents
    )
    return documents, [path.name for path in paths]


def _report(prefix: Path, info: DatasetInfo) -> str:
    rows = {
        "documents": f"{info.documents:,} ({info.skipped_documents:,} empty ones left out)",
        "tokens": f"{info.tokens:,} (end-of-document ids included)",
        "text": f"{info.text_bytes:,} bytes, {info.text_bytes / info.tokens:.2f} per token",
        "vocabulary": f"{info.vocab_size:,} pieces, tokenizer sha256 {info.tokenizer_sha256[:12]}",
        "files": f"{prefix}.bin {info.bin_bytes:,} bytes, .idx {info.idx_bytes:,} bytes, .json",
    }
    return "".join(f"{name:<11}{value}\n" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(main())
