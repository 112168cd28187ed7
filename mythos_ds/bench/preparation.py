"""How fast data preparation reads the same text out of different files, and the memory that each process takes."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mythos_ds.data.corpus import build_corpus
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import ReadOptions, read_rows
from mythos_ds.errors import DataError

_DOCUMENT_CHARACTERS = 3000
_TINY_CHARACTERS = 100
_SOURCE_BYTES = 20_000_000


@dataclass(frozen=True)
class Preparation:
    """One measured preparation: text, seconds on the clock and of all cores, and the most memory that the process which
    reads and one of the others took."""

    name: str
    text_bytes: int
    documents: int
    seconds: float
    core_seconds: float
    reader_bytes: int
    worker_bytes: int


def make_inputs(folder: Path, megabytes: int, row_groups: int) -> dict[str, Path]:
    """Write the same text as JSONL, as one text file, as tiny documents, as Parquet of many row groups and as .zst.

    It is the text of the built-in corpus, from its second turn on with the turn's number before each document. Raises
    DataError without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("the measurement needs an extra: pip install 'mythos_ds[hf]'", code="MDS004") from error
    folder.mkdir(parents=True, exist_ok=True)
    names = ("documents.jsonl", "one.txt", "tiny.jsonl", "groups.parquet", "documents.jsonl.zst")
    inputs = {name: folder / name for name in names}
    size = megabytes * 1_000_000
    documents = list(_cut(_SOURCE_BYTES, _DOCUMENT_CHARACTERS))
    with (
        inputs["documents.jsonl"].open("w", encoding="utf-8") as lines,
        inputs["one.txt"].open("w", encoding="utf-8") as whole,
        inputs["tiny.jsonl"].open("w", encoding="utf-8") as tiny,
        pyarrow.CompressedOutputStream(str(inputs["documents.jsonl.zst"]), "zstd") as packed,
        parquet.ParquetWriter(inputs["groups.parquet"], pyarrow.schema([("text", pyarrow.string())])) as table,
    ):
        group: list[str] = []
        group_size = 0
        for document in _repeated(documents, size):
            line = json.dumps({"text": document}) + "\n"
            lines.write(line)
            packed.write(line.encode())
            whole.write(document)
            for start in range(0, len(document), _TINY_CHARACTERS):
                tiny.write(json.dumps({"text": document[start : start + _TINY_CHARACTERS]}) + "\n")
            group.append(document)
            group_size += len(document)
            if group_size >= size // row_groups:
                table.write_table(pyarrow.table({"text": group}))
                group, group_size = [], 0
        if group:
            table.write_table(pyarrow.table({"text": group}))
    return inputs


def _cut(max_bytes: int, size: int) -> Iterator[str]:
    for document in build_corpus(max_bytes=max_bytes):
        for start in range(0, len(document.text), size):
            yield document.text[start : start + size]


def _repeated(documents: list[str], size: int) -> Iterator[str]:
    done = number = 0
    while done < size:
        turn, place = divmod(number, len(documents))
        # Never the same text twice: a part that was encoded before is taken as it is.
        document = f"{turn}: {documents[place]}" if turn else documents[place]
        yield document
        done += len(document.encode("utf-8", "replace"))
        number += 1


def measure(path: Path, tokenizer: Path, workers: int) -> Preparation:
    """Prepare one file in a process of its own. Raises DataError with what that process says where it fails."""
    command = [sys.executable, "-m", __name__, str(path), str(tokenizer), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{path}: {done.stderr.strip()[-2000:]}")
    return Preparation(**json.loads(done.stdout.splitlines()[-1]))


def _measured(path: Path, tokenizer: Path, workers: int) -> Preparation:
    start = time.perf_counter()
    rows = read_rows([path], ReadOptions())
    prefix = path.with_name(f"{path.name}-tokens")
    info = prepare_dataset(rows, tokenizer_path=tokenizer, prefix=prefix, workers=workers, overwrite=True)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cores = sum(each.ru_utime + each.ru_stime for each in used)
    worker = used[1].ru_maxrss * 1024
    return Preparation(path.name, info.text_bytes, info.documents, seconds, cores, _peak_bytes(), worker)


def _peak_bytes() -> int:
    """The most memory of this process; what getrusage says of it begins with that of the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measured(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))) + "\n")
