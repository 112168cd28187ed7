"""Preparations that end on the way, meet bad rows, or meet each other: nothing is published, and the next goes on."""

import errno
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.data import parts, prepare, text_cuts, token_files
from mythos_ds.data.dataset_info import dataset_files, read_info
from mythos_ds.data.encoding import Encoder
from mythos_ds.data.inspection import DatasetView
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.readers import ReadOptions, read_rows
from mythos_ds.data.rows import STOP_AFTER, BadRow, LongText
from mythos_ds.errors import DataError, MythosError, OutputError
from tests.helpers.text_data import make_texts, make_tokenizer

TEXTS = make_texts(400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts, batches and pieces of some kilobytes, as larger input has them."""
    monkeypatch.setattr(prepare, "_PART_CHARACTERS", 5000)
    monkeypatch.setattr(prepare, "PIECE_CHARACTERS", 2000)
    monkeypatch.setattr(text_cuts, "PIECE_CHARACTERS", 2000)


def made(folder, tokenizer, rows, name="out", **options):
    return prepare_dataset(rows, tokenizer_path=tokenizer.path, prefix=folder / name, **options)


def content(folder, name="out"):
    return [path.read_bytes() for path in dataset_files(folder / name)]


def encoded(monkeypatch):
    """Counts the texts that are encoded from now on."""
    seen: list[str] = []
    whole = Encoder.encode

    def encode(self, batch):
        seen.extend(batch.texts)
        return whole(self, batch)

    monkeypatch.setattr(Encoder, "encode", encode)
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_ends_anywhere_is_gone_on_with(tmp_path, tokenizer, small_parts, monkeypatch, seed):
    texts = [*TEXTS, LongTextOf(TEXTS), *TEXTS[::-1]]
    place = random.Random(seed).randrange(130, len(texts))  # the first 100 are read before the first is kept
    whole = made(tmp_path, tokenizer, rows_of(texts), "whole")

    def broken():
        yield from rows_of(texts[:place])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, tokenizer, broken())
    assert (tmp_path / ".out.unfinished").is_dir()
    assert not any(path.exists() for path in dataset_files(tmp_path / "out"))
    seen = encoded(monkeypatch)
    assert made(tmp_path, tokenizer, rows_of(texts)) == whole
    assert content(tmp_path) == content(tmp_path, "whole")
    assert len(seen) < len(texts)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class LongTextOf:
    """A document that is read in pieces."""

    def __init__(self, texts, bad=None):
        self.texts, self.bad = texts, bad

    def row(self):
        return LongText("long.txt", iter([*self.texts, *([self.bad] if self.bad else [])]))


def rows_of(texts):
    return (text.row() if isinstance(text, LongTextOf) else text for text in texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_document_is_one_document(tmp_path, tokenizer, small_parts, workers):
    texts: list[Any] = [TEXTS[0], LongTextOf(TEXTS), TEXTS[1], LongTextOf(["short"]), LongTextOf(["", " \n"]), TEXTS[2]]
    joined: list[str] = ["".join(text.texts) if isinstance(text, LongTextOf) else text for text in texts]
    info = made(tmp_path, tokenizer, rows_of(texts), workers=workers, shuffle_seed=None)
    view = DatasetView(tmp_path / "out")
    assert [view.text(n, tokenizer) for n in range(len(view.lengths))] == [text for text in joined if text.strip()]
    assert view.boundaries().sound
    assert view.document(1).tolist() == [*tokenizer.encode(joined[1]), tokenizer.eos_id]
    assert info.skipped_documents == 1
    assert info.text_bytes == sum(len(text.encode()) for text in joined if text.strip())


def test_bad_rows_stop_and_a_mended_input_goes_on(tmp_path, tokenizer, small_parts, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*lines[:300], '{"text": null}', *lines[301:350], "{", *lines[351:]]))
    with pytest.raises(DataError, match=r"(?s)2 bad rows .*line 301: .*null.*line 351: not JSON") as told:
        made(tmp_path, tokenizer, read_rows([path], ReadOptions()))
    assert ".out.unfinished, and a rerun goes on from them" in str(told.value)
    assert not any(file.exists() for file in dataset_files(tmp_path / "out"))
    path.write_text("\n".join(lines))
    seen = encoded(monkeypatch)
    info = made(tmp_path, tokenizer, read_rows([path], ReadOptions()))
    assert len(seen) < 150  # only the parts with these two lines
    monkeypatch.undo()
    assert made(tmp_path, tokenizer, TEXTS, "whole") == info


def test_reading_ends_after_many_bad_rows(tmp_path, tokenizer):
    read = []

    def rows():
        for number in range(100):
            read.append(number)
            yield BadRow(f"a line {number}", "not JSON")

    with pytest.raises(DataError, match=rf"{STOP_AFTER} bad rows, after which reading ended"):
        made(tmp_path, tokenizer, rows())
    assert len(read) <= 100
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_left_out_and_listed(tmp_path, tokenizer):
    bad = [BadRow(f"a line {number}", "not JSON") for number in range(50)]
    rows = [row for pair in zip(bad, TEXTS, strict=False) for row in pair]
    info = made(tmp_path, tokenizer, rows, skip_bad_rows=True)
    assert (info.bad_rows, len(info.bad_row_examples), info.documents) == (50, 20, 50)
    assert read_info(tmp_path / "out") == info
    clean = made(tmp_path, tokenizer, TEXTS[:50], "clean")
    assert content(tmp_path)[:2] == content(tmp_path, "clean")[:2]
    assert clean.bad_rows == 0
    assert "bad_row" not in (tmp_path / "clean.json").read_text()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("at", [0, 1, 300])
def test_a_long_document_that_turns_bad_is_none(tmp_path, tokenizer, small_parts, skip, at):
    long = LongTextOf(TEXTS[:at], BadRow("long.txt line 9", "not readable as UTF-8 text"))
    rows = list(rows_of([*TEXTS[:5], long, *TEXTS[5:9]]))
    if not skip:
        with pytest.raises(DataError, match=r"long\.txt line 9: not readable"):
            made(tmp_path, tokenizer, rows)
        return
    info = made(tmp_path, tokenizer, rows, skip_bad_rows=True)
    assert info.bad_rows == 1
    assert content(tmp_path)[:2] == (made(tmp_path, tokenizer, TEXTS[:9], "clean") and content(tmp_path, "clean")[:2])
    assert info.tokens == read_info(tmp_path / "clean").tokens


@pytest.mark.parametrize("damage", ["tokens", "record", "cut", "link"])
def test_damaged_parts_are_made_anew(tmp_path, tokenizer, small_parts, damage):
    whole = made(tmp_path, tokenizer, TEXTS, "whole")
    with pytest.raises(DataError):
        made(tmp_path, tokenizer, [*TEXTS[:300], BadRow("a", "b")])
    folder = tmp_path / ".out.unfinished"
    tokens, journal = folder / "tokens", folder / "parts.jsonl"
    if damage == "tokens":
        tokens.write_bytes(bytes(tokens.stat().st_size))
    elif damage == "record":
        journal.write_bytes(b'{"key": 3}\n' + b"[" * 5000 + b"\n" + journal.read_bytes())
    elif damage == "cut":
        os.truncate(tokens, 100)
    else:
        tokens.rename(tmp_path / "elsewhere")
        tokens.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(MythosError, match="a link"):
            made(tmp_path, tokenizer, TEXTS)
        return
    assert made(tmp_path, tokenizer, TEXTS) == whole
    assert content(tmp_path) == content(tmp_path, "whole")


def test_parts_of_another_tokenizer_are_not_taken(tmp_path, tokenizer, small_parts):
    other = make_tokenizer(tmp_path / "other", vocab_size=390)
    with pytest.raises(DataError):
        made(tmp_path, other, [*TEXTS, BadRow("a", "b")])
    assert made(tmp_path, tokenizer, TEXTS) == made(tmp_path, tokenizer, TEXTS, "whole")


JOB = """
import multiprocessing, os, signal, sys
from pathlib import Path
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.errors import MythosError

def documents():
    for number in range(int(sys.argv[3])):
        yield f"words of job {sys.argv[4]} that differ {number} " * 20
        if workers > 1 and number == 5000:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

workers = int(sys.argv[5])
if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        prepare_dataset(documents(), tokenizer_path=Path(sys.argv[1]), prefix=Path(sys.argv[2]), workers=workers)
    except MythosError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


def job(tmp_path, tokenizer, name, *, documents=20_000, workers=1):
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    command = [
        sys.executable,
        str(script),
        str(tokenizer.path),
        str(tmp_path / "out"),
        str(documents),
        name,
        str(workers),
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_of_two_jobs_into_one_output_one_is_refused(tmp_path, tokenizer):
    jobs = [job(tmp_path, tokenizer, name, documents=3000) for name in "ab"]
    for process in jobs:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in jobs]
    codes = [process.returncode for process in jobs]
    assert sorted(codes) == [0, 2], said
    assert any(words in said[codes.index(2)][1] for words in ("prepare-data", "exists; give --overwrite"))
    winner = "ab"[codes.index(0)]
    view = DatasetView(tmp_path / "out")
    assert all(f"job {winner} " in view.text(n, tokenizer, limit=40) for n in range(0, 3000, 500))


def test_a_killed_worker_is_one_message(tmp_path, tokenizer):
    """What the kernel does where memory is short."""
    process = job(tmp_path, tokenizer, "a", workers=2)
    _, errors = process.communicate("\n", timeout=120)
    assert process.returncode == 2
    assert "a process that tokenises was killed, most likely because memory ran out: give fewer --workers" in errors
    assert "Traceback" not in errors
    assert not any(path.exists() for path in dataset_files(tmp_path / "out"))


def test_memory_that_runs_out_here_is_one_message(tmp_path, tokenizer, monkeypatch):
    def encode(self, batch):
        raise MemoryError

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(DataError, match="there was no more memory"):
        made(tmp_path, tokenizer, TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data.bin", "data.idx", "parts.jsonl", "tokens"])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_planted_links_among_the_parts_are_not_written_through(tmp_path, tokenizer, name, make):
    secret = tmp_path / "secret"
    secret.write_bytes(b"of another")
    (tmp_path / ".out.unfinished").mkdir()
    make(secret, tmp_path / ".out.unfinished" / name)
    made(tmp_path, tokenizer, TEXTS)
    assert secret.read_bytes() == b"of another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json", "secret"]
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_what_the_text_is_made_from_is_never_replaced(tmp_path, tokenizer, ending):
    given = tmp_path / f"out{ending}"
    given.write_text('{"text": "a"}\n')
    (tmp_path / "link").symlink_to(given)
    for inputs in ([given], [tmp_path / "other", tmp_path / "link"]):
        with pytest.raises(DataError, match=rf"out{ending} would take the place of the input"):
            made(tmp_path, tokenizer, ["a"], inputs=inputs, overwrite=True)
    assert given.read_text() == '{"text": "a"}\n'


def test_the_tokenizer_is_never_replaced(tmp_path, tokenizer):
    given = tmp_path / "out.json"
    given.write_bytes(tokenizer.path.read_bytes())
    with pytest.raises(DataError, match="would take the place of the input"):
        prepare_dataset(["a"], tokenizer_path=given, prefix=tmp_path / "out", overwrite=True)
    assert given.read_bytes() == tokenizer.path.read_bytes()


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_an_output_without_a_name(tokenizer, name):
    with pytest.raises(DataError, match="names no file"):
        prepare_dataset(["a"], tokenizer_path=tokenizer.path, prefix=Path(name))


def test_a_long_name_leaves_nothing_behind(tmp_path, tokenizer):
    name = "é" * 120
    made(tmp_path, tokenizer, ["a"], name)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]


def test_parts_are_spoken_of_only_where_there_are_some(tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        made(tmp_path, tokenizer, [BadRow("a line 1", "not JSON")])
    assert "finished parts" not in str(caught.value)
    with pytest.raises(DataError, match="finished parts are in"):
        made(tmp_path, tokenizer, ["a", BadRow("a line 1", "not JSON")])


@pytest.mark.parametrize("name", ["tokens", "parts.jsonl", "data.bin", "data.idx"])
def test_a_full_disk_names_the_file_and_publishes_nothing(tmp_path, tokenizer, monkeypatch, name):
    module, opener = (parts, "_open_for_writing") if name in ("tokens", "parts.jsonl") else (token_files, "_new")
    whole = getattr(module, opener)

    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` raises it, without a name

    monkeypatch.setattr(module, opener, lambda path, *more: Full() if path.name == name else whole(path, *more))
    with pytest.raises(OutputError, match=rf"\.out\.unfinished/{name}: not written \(No space left on device"):
        made(tmp_path, tokenizer, TEXTS)
    assert not any(path.exists() for path in dataset_files(tmp_path / "out"))
    monkeypatch.undo()
    made(tmp_path, tokenizer, TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]
