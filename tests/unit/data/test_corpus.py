"""The built-in corpus: deterministic, deduplicated, bounded, and a fair validation part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mythos_ds.data import corpus
from mythos_ds.data.builtin import existing_builtin, prepare_builtin
from mythos_ds.data.corpus import build_corpus, write_corpus
from mythos_ds.data.inspection import DatasetView
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError

SMALL = 800_000


@pytest.fixture(scope="module")
def documents():
    return build_corpus(max_bytes=SMALL)


def test_two_builds_are_equal(documents):
    assert build_corpus(max_bytes=SMALL) == documents


def test_seed_changes_only_the_order(documents):
    other = build_corpus(max_bytes=SMALL, seed=1)
    assert other != documents
    assert sorted(document.text for document in other) == sorted(document.text for document in documents)


def test_size_and_kinds(documents):
    size = sum(document.size for document in documents)
    assert 0.9 * SMALL < size <= SMALL
    assert {document.kind for document in documents} == {"code", "english"}


def test_no_text_twice(documents):
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts)


def test_validation_part_has_both_kinds_and_no_text_of_its_own_training_part(documents):
    cut = round(0.9 * len(documents))
    train, valid = documents[:cut], documents[cut:]
    assert {document.kind for document in valid} == {"code", "english"}
    shared = {document.source for document in train} & {document.source for document in valid}
    assert len(shared) <= 1  # the cut may fall between a part and its comments


def test_works_without_test_folders_and_topics(documents, monkeypatch):
    monkeypatch.setattr(corpus, "_topic_groups", lambda: iter(()))
    monkeypatch.setattr(corpus, "_is_test", lambda path, root: False)
    assert build_corpus(max_bytes=300_000)


def test_no_python_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no Python sources"):
        build_corpus(max_bytes=SMALL)


def test_files_that_do_not_parse_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("def (:\n" * 200, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 200)
    (tmp_path / "good.py").write_text("value = 1  # a line\n" * 50, encoding="utf-8")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus, "_topic_groups", lambda: iter(()))
    assert [document.source for document in build_corpus()] == ["good.py:0"]


def test_written_as_json_lines(documents, tmp_path):
    write_corpus(documents[:5], tmp_path / "c.jsonl")
    lines = (tmp_path / "c.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == [document.text for document in documents[:5]]


BUILD = """
import sys
from pathlib import Path
from mythos_ds.data.builtin import prepare_builtin
if __name__ == "__main__":
    print(prepare_builtin(Path(sys.argv[1]), max_bytes=300_000).prefix)
"""


def test_two_processes_build_the_builtin_dataset_at_once(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILD, encoding="utf-8")
    data_dir = tmp_path / "data"
    command = [sys.executable, str(script), str(data_dir)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs == [f"{data_dir}/builtin/tokens\n"] * 2
    assert [path.name for path in data_dir.iterdir()] == ["builtin"]
    before = {path: path.stat().st_mtime_ns for path in (data_dir / "builtin").iterdir()}
    data = prepare_builtin(data_dir)
    assert {path: path.stat().st_mtime_ns for path in (data_dir / "builtin").iterdir()} == before
    view, tokenizer = DatasetView(data.prefix), Tokenizer.load(data.tokenizer)
    assert view.boundaries().sound
    texts = [json.loads(line)["text"] for line in _lines(data.folder / "corpus.jsonl")]
    assert [view.text(number, tokenizer) for number in range(len(texts))] == texts


def test_builtin_not_made_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"mythos-ds build-corpus"):
        existing_builtin(tmp_path)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
