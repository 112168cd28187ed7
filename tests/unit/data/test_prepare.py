"""Indexed datasets: content, order, atomic output, sidecar."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mythos_ds.data.dataset_info import dataset_files, read_info
from mythos_ds.data.inspection import DatasetView, length_histogram, save_histogram
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.token_files import TokenWriter
from mythos_ds.errors import DataError
from tests.helpers.text_data import make_texts, make_tokenizer

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prepare(tmp_path, tokenizer, texts=TEXTS, name="out", **options):
    return prepare_dataset(texts, tokenizer_path=tokenizer.path, prefix=tmp_path / name, **options)


def texts_of(prefix, tokenizer):
    view = DatasetView(prefix)
    return [view.text(number, tokenizer) for number in range(len(view.lengths))]


def test_content_boundaries_and_counts(tmp_path, tokenizer):
    info = prepare(tmp_path, tokenizer, [TEXTS[0], "", *TEXTS[1:], " \n"], shuffle_seed=None, sources=["a"])
    view = DatasetView(tmp_path / "out")
    assert texts_of(tmp_path / "out", tokenizer) == TEXTS
    assert all(view.document(n)[-1] == tokenizer.eos_id for n in range(len(TEXTS)))
    assert view.boundaries().sound
    assert view.dtype == "uint16"
    assert (info.documents, info.skipped_documents) == (len(TEXTS), 2)
    assert info.tokens == int(view.lengths.sum()) == info.bin_bytes // 2
    assert info.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert info == read_info(tmp_path / "out")


def test_shuffle_is_seeded_and_complete(tmp_path, tokenizer):
    first = prepare(tmp_path, tokenizer, name="a")
    again = prepare(tmp_path, tokenizer, name="b")
    other = prepare(tmp_path, tokenizer, name="c", shuffle_seed=1)
    assert first == again
    assert first.content_sha256 != other.content_sha256
    shuffled = texts_of(tmp_path / "a", tokenizer)
    assert shuffled != TEXTS
    assert sorted(shuffled) == sorted(TEXTS)


def test_worker_processes_give_the_same_files(tmp_path, tokenizer):
    texts = TEXTS * 60  # several batches
    alone = prepare(tmp_path, tokenizer, texts, name="a")
    seen = []
    together = prepare(tmp_path, tokenizer, texts, name="b", workers=2, on_progress=lambda *done: seen.append(done))
    assert alone == together
    for one, two in zip(dataset_files(tmp_path / "a")[:2], dataset_files(tmp_path / "b")[:2], strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert len(seen) > 1
    assert seen[-1] == (together.documents, together.tokens, together.text_bytes)


def test_existing_output_is_kept_unless_told(tmp_path, tokenizer):
    first = prepare(tmp_path, tokenizer)
    with pytest.raises(DataError, match="--overwrite"):
        prepare(tmp_path, tokenizer, TEXTS[:3])
    assert read_info(tmp_path / "out") == first
    assert prepare(tmp_path, tokenizer, TEXTS[:3], overwrite=True).documents == 3
    assert read_info(tmp_path / "out").documents == 3


def test_failing_input_leaves_nothing(tmp_path, tokenizer):
    def broken():
        yield from TEXTS
        raise DataError("line 7 is bad")

    for workers in (1, 2):
        with pytest.raises(DataError, match="line 7"):
            prepare(tmp_path, tokenizer, broken(), workers=workers)
    with pytest.raises(DataError, match="all empty"):
        prepare(tmp_path, tokenizer, ["", "\n"])
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.token_files import TokenWriter

def documents():
    for _ in range(20_000):
        yield "some words that repeat"
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    prepare_dataset(
        documents(), tokenizer_path=Path(sys.argv[1]), prefix=Path(sys.argv[2]), workers=2, overwrite=True
    )
"""


def test_killed_run_leaves_nothing_that_looks_finished(tmp_path, tokenizer):
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    folder = tmp_path / "out"
    folder.mkdir()
    kept = prepare(folder, tokenizer, name="data")
    command = [sys.executable, str(script), str(tokenizer.path)]
    # Waits for the pipes to close: worker processes that outlived their parent would hold them open.
    for prefix in (folder / "fresh", folder / "data"):
        result = subprocess.run([*command, str(prefix)], capture_output=True, timeout=60, check=False)
        assert result.returncode == -9, result.stderr
    finished = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert sorted(path.name for path in finished) == ["data.bin", "data.idx", "data.json"]
    assert read_info(folder / "data") == kept
    with pytest.raises(DataError, match=r"no dataset at .*fresh"):
        read_info(folder / "fresh")


def test_pair_without_sidecar_does_not_count(tmp_path, tokenizer):
    prepare(tmp_path, tokenizer)
    (tmp_path / "out.json").unlink()
    with pytest.raises(DataError, match=r"out\.json missing; make it with: mythos-ds prepare-data"):
        DatasetView(tmp_path / "out")


def test_torn_file_is_noticed(tmp_path, tokenizer):
    prepare(tmp_path, tokenizer)
    with (tmp_path / "out.bin").open("ab") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"out\.bin is damaged.*100 bytes given"):
        read_info(tmp_path / "out")


@pytest.mark.parametrize(("key", "value", "message"), [("format", 9, "format 9"), ("tokens", None, None)])
def test_other_sidecar(tmp_path, tokenizer, key, value, message):
    prepare(tmp_path, tokenizer)
    path = tmp_path / "out.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields[key] = value
    if value is None:
        del fields[key]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(DataError, match=message or "does not describe a dataset"):
        read_info(tmp_path / "out")


def test_histogram(tmp_path):
    bins = length_histogram(np.array([1, 2, 3, 4, 20]))
    assert [(b.low, b.documents, b.tokens) for b in bins] == [
        (1, 1, 1),
        (2, 2, 5),
        (4, 1, 4),
        (8, 0, 0),
        (16, 1, 20),
    ]
    pytest.importorskip("matplotlib")
    save_histogram(bins, tmp_path / "h.png", "title")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_document_number_out_of_range_and_other_tokenizer(tmp_path, tokenizer):
    prepare(tmp_path, tokenizer)
    view = DatasetView(tmp_path / "out")
    with pytest.raises(DataError, match=r"allowed: 0 \.\. 59"):
        view.document(60)
    with pytest.raises(DataError, match="not the tokenizer"):
        view.text(0, make_tokenizer(tmp_path / "other", vocab_size=390))


@pytest.mark.parametrize("vocab_size", [400, 65_499, 65_500, 100_000])
def test_the_files_are_those_that_megatron_writes(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = np.random.Generator(np.random.Philox(vocab_size))
    documents = [generator.integers(0, vocab_size, size) for size in (1, 5, 300, 7)]
    own = TokenWriter(tmp_path / "own", vocab_size)
    for document in documents:
        own.add(document[:1], np.zeros(0, np.int64))
        own.add(document[1:], np.array([len(document)]))
    own.close()
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        theirs.add_document(document, [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"own.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_preparing_loads_no_torch(tmp_path, tokenizer):
    code = (
        "import sys; from pathlib import Path; from mythos_ds.data.prepare import prepare_dataset; "
        "prepare_dataset(['some text'], tokenizer_path=Path(sys.argv[1]), prefix=Path(sys.argv[2])); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tokenizer.path), str(tmp_path / "out")]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0
