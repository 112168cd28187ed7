"""Turns JSON, plain text, tables, Parquet or a Hugging Face dataset into an indexed dataset (.bin, .idx, .json)."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from mythos_ds.data.dataset_info import DatasetInfo
from mythos_ds.data.inputs import FORMATS, find_inputs
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import ReadOptions, limited, read_hub, read_rows
from mythos_ds.data.rows import MAX_ROW_BYTES, Row
from mythos_ds.data.text_streams import UTF_8, checked_encoding
from mythos_ds.errors import DataError
from mythos_ds.io import read_bytes
from mythos_ds.mains import counted_progress, run_tool, tool_parser

EXAMPLE = """mythos-ds prepare-data docs.jsonl --tokenizer data/tokenizer.model --output data/docs
  mythos-ds prepare-data --hf HuggingFaceFW/fineweb-edu --hf-config sample-10BT --max-documents 100000 \\
      --tokenizer data/tokenizer.model --output data/fineweb
  mythos-ds prepare-data chats.jsonl --chat --tokenizer SmolLM2 --output data/chats"""


_LARGEST_ROW = (1 << 31) - 2
_KEY = "text"


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__ or "", EXAMPLE)
    parser.add_argument("inputs", nargs="*", type=Path, help="files, or folders of files (their endings: docs/data.md)")
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
    parser.add_argument(
        "--break-lock", action="store_true", help="take the output from a job that no longer runs on another machine"
    )
    return run_tool(parser, _prepare, argv)


def _add_source_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--key", default=_KEY, help="field or column that holds the text, a.b for one inside another (default: text)"
    )
    parser.add_argument("--format", choices=sorted(set(FORMATS.values())), help="default: by each file's ending")
    parser.add_argument("--encoding", default=UTF_8, help="of text that is not UTF-8, such as latin-1 or utf-16")
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="stop (default): tell the bad rows, up to 20, and publish nothing; skip: leave them out and count them",
    )
    parser.add_argument(
        "--max-row-bytes", type=int, default=MAX_ROW_BYTES, help="a longer row is a bad one (default: %(default)s)"
    )
    parser.add_argument(
        "--text-documents",
        choices=("file", "paragraph"),
        default="file",
        help="a plain text file is one document (default), or one per paragraph, cut at blank lines",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="rows are conversations (forms: docs/instruction_tuning.md); the loss counts what the assistant writes",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja (default: the one beside the tokenizer)"
    )
    parser.add_argument("--hf", metavar="NAME", help="Hugging Face dataset, or a folder that save_to_disk wrote")
    parser.add_argument("--hf-config", metavar="CONFIG", help="its configuration")
    parser.add_argument("--hf-split", default="train", help="its split (default: train)")
    parser.add_argument("--hf-download", action="store_true", help="download it whole instead of streaming")


def _prepare(arguments: Namespace) -> None:
    documents, inputs, sources = _documents(arguments)
    with counted_progress("tokenising", arguments.max_documents) as update:
        info = prepare_dataset(
            limited(documents, arguments.max_documents),
            tokenizer_path=arguments.tokenizer,
            prefix=arguments.output,
            workers=arguments.workers,
            shuffle_seed=None if arguments.keep_order else arguments.shuffle_seed,
            overwrite=arguments.overwrite,
            sources=sources,
            inputs=inputs,
            on_progress=update,
            skip_bad_rows=arguments.on_bad_row == "skip",
            break_lock=arguments.break_lock,
            chat=arguments.chat,
            chat_template=_template(arguments.chat_template),
        )
    sys.stdout.write(_report(arguments.output, info))


def _template(path: Path | None) -> str | None:
    """The content of a file. Raises DataError for one that is no text."""
    if path is None:
        return None
    try:
        text = read_bytes(path, DataError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--chat-template {path}: not UTF-8 text ({error})", code="MDS120") from error
    if not text.strip():
        raise DataError(f"--chat-template {path}: an empty file; allowed: a template in Jinja", code="MDS120")
    return text


def _check_chat(arguments: Namespace) -> None:
    """Raises DataError for an option that has no effect."""
    if not arguments.chat and arguments.chat_template is not None:
        raise DataError("--chat-template has no effect without --chat; add --chat, or remove it", code="MDS120")
    for name, default in (("key", _KEY), ("text_documents", "file")):
        if arguments.chat and getattr(arguments, name) != default:
            raise DataError(f"--{name.replace('_', '-')} has no effect with --chat; remove it", code="MDS120")


def _documents(arguments: Namespace) -> tuple[Iterator[Row], list[Path], list[str]]:
    _check_numbers(arguments)
    _check_chat(arguments)
    if bool(arguments.inputs) == bool(arguments.hf):
        raise DataError("give either input files or --hf NAME")
    options = ReadOptions(
        key=arguments.key,
        file_format=arguments.format,
        text_documents=arguments.text_documents,
        encoding=checked_encoding(arguments.encoding),
        max_row_bytes=arguments.max_row_bytes,
        chat=arguments.chat,
    )
    if arguments.hf:
        rows = read_hub(
            arguments.hf,
            config=arguments.hf_config,
            split=arguments.hf_split,
            options=options,
            streaming=not arguments.hf_download,
        )
        return rows, [], [f"hf:{arguments.hf}/{arguments.hf_config or 'default'}/{arguments.hf_split}"]
    found = find_inputs(arguments.inputs)
    sys.stderr.write(found.report())
    return read_rows(found.files, options), found.files, [path.name for path in found.files]


def _check_numbers(arguments: Namespace) -> None:
    """Raises DataError for a number that means nothing."""
    bounds = {"workers": (1, 1024), "max_documents": (1, 1 << 62), "max_row_bytes": (1, _LARGEST_ROW)}
    for name, (least, most) in bounds.items():
        given = getattr(arguments, name)
        if given is not None and not least <= given <= most:
            raise DataError(f"--{name.replace('_', '-')} {given} given; allowed: {least} .. {most}", code="MDS120")
    if not 0 <= arguments.shuffle_seed < 1 << 128:
        raise DataError(f"--shuffle-seed {arguments.shuffle_seed} given; allowed: 0 .. 2**128 - 1", code="MDS120")


def _report(prefix: Path, info: DatasetInfo) -> str:
    share = info.counted_tokens / info.tokens
    rows = {
        **(
            {"chats": f"{info.documents:,}"}
            if info.is_chat
            else {"documents": f"{info.documents:,} ({info.skipped_documents:,} empty ones left out)"}
        ),
        **({"bad rows": f"{info.bad_rows:,} left out"} if info.bad_rows else {}),
        "tokens": f"{info.tokens:,} (end-of-document ids included)",
        "text": f"{info.text_bytes:,} bytes, {info.text_bytes / info.tokens:.2f} per token",
        "vocabulary": f"{info.vocab_size:,} pieces, tokenizer sha256 {info.tokenizer_sha256[:12]}",
        "files": f"{prefix}.bin {info.bin_bytes:,} bytes, .idx {info.idx_bytes:,} bytes, .json",
    }
    if info.is_chat:
        ends = ", ".join(map(str, info.turn_ends))
        no_end = "no special token: generation would not know where an answer ends"
        rows |= {
            "tokens": f"{info.tokens:,}, {share:.1%} of them the assistant's, which the loss counts",
            "answers": f"end with {f'id {ends}' if ends else no_end}",
            "files": f"{rows['files']}, .mask",
        }
    examples = "".join(f"  {example}\n" for example in info.bad_row_examples)
    return "".join(f"{name:<11}{value}\n" for name, value in rows.items()) + examples


if __name__ == "__main__":
    sys.exit(main())
