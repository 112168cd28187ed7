"""Documents out of every input format, and what is said about bad ones."""

import builtins
import gzip
import json

import pytest

from mythos_ds.data.inputs import find_inputs
from mythos_ds.data.readers import ReadOptions, limited, read_files, read_hub
from mythos_ds.data.rows import whole_texts
from mythos_ds.errors import DataError

TEXTS = ["first document\n", "second\n\nwith a blank line", "third \u2028 one\r\n"]


def write_jsonl(path, texts, key="text"):
    lines = [json.dumps({key: text, "id": 1}, ensure_ascii=False) + "\n" for text in texts]
    content = "".join(lines).encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    write_jsonl(tmp_path / name, TEXTS, key="content")
    assert list(read_files([tmp_path / name], key="content")) == TEXTS


def test_plain_text_by_file_and_by_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\n \nthree\r\n\n")
    assert list(read_files([path])) == ["one\ntwo\n\n \nthree\r\n\n"]
    assert list(read_files([path], text_documents="paragraph")) == ["one\ntwo\n", "three\r\n"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert list(read_files([tmp_path / "a.parquet"])) == TEXTS
    with pytest.raises(DataError, match="no column 'body'; allowed for --key: 'text', 'id'"):
        list(read_files([tmp_path / "a.parquet"], key="body"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        list(read_files([tmp_path / "b.parquet"]))


def test_folders_are_searched_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "z.jsonl", ["z"])
    (tmp_path / "notes.bin").write_bytes(b"")
    assert list(read_files(find_inputs([tmp_path]).files)) == ["b", "z"]


def test_limit():
    assert list(limited(iter("abc"), 2)) == ["a", "b"]
    assert list(limited(iter("abc"), None)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a JSON object is needed, list given"),
        ('{"body": "x"}', "line 2: no field 'text'; allowed for --key: 'body'"),
        ('{"text": 3}', "line 2: field 'text' is int, text is needed"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_files([path]))


def test_bad_inputs(tmp_path):
    with pytest.raises(DataError, match="not found"):
        find_inputs([tmp_path / "none"])
    with pytest.raises(DataError, match="no file ending in"):
        find_inputs([tmp_path])
    (tmp_path / "a.doc").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown ending"):
        list(read_files([tmp_path / "a.doc"]))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        list(read_files([tmp_path / "a.txt"]))


def test_hub_datasets_from_local_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    assert list(read_hub(str(tmp_path / "saved"), options=ReadOptions(key="body"))) == TEXTS
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", TEXTS)
    assert list(read_hub(str(tmp_path / "folder"))) == TEXTS
    with pytest.raises(DataError, match="no field 'words'"):
        list(whole_texts(read_hub(str(tmp_path / "folder"), options=ReadOptions(key="words"))))
    with pytest.raises(DataError, match="Hugging Face dataset"):
        list(read_hub(str(tmp_path / "none")))


def test_missing_library_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *arguments, **named):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match=r"mythos_ds\[hf\]"):
        list(read_hub("any"))
