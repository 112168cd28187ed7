"""The data tools as a user calls them."""

import json
import re

import pytest

from mythos_ds.data.dataset_info import read_info
from mythos_ds.errors import DataError
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.text_data import make_texts, make_tokenizer

TOOLS = ROOT / "tools"
TEXTS = make_texts(40)


def load(name):
    return load_main(f"tools/{name}.py")


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["build_corpus", "train_tokenizer", "prepare_data", "inspect_data"])
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load(name).main(["--help"])
    assert stop.value.code == 0
    assert f"mythos-ds {name.replace('_', '-')} " in capsys.readouterr().out


def test_tokenizer_data_and_inspection(documents, tmp_path, capsys):
    model, prefix = tmp_path / "t.model", tmp_path / "out" / "docs"
    train = ["train_tokenizer", str(documents), "--output", str(model), "--vocab-size", "330"]
    assert run(train) == 0
    prepare = [
        "prepare_data",
        str(documents),
        "--tokenizer",
        str(model),
        "--output",
        str(prefix),
        "--workers",
        "1",
    ]
    assert run([*prepare, "--keep-order"]) == 0
    assert read_info(prefix).sources == ("docs.jsonl",)
    assert "documents  40 (0 empty ones left out)" in capsys.readouterr().out
    inspect = [
        "inspect_data",
        str(prefix),
        "--tokenizer",
        str(model),
        "--document",
        "3",
        "--tokens",
        "100000",
    ]
    assert run([*inspect, "--boundaries"]) == 0
    out = capsys.readouterr().out
    assert TEXTS[3] in out
    assert "all 40 documents end with id 2" in out
    assert run(["inspect_data", str(prefix)]) == 0


def test_fewer_pieces_than_asked_for_are_said(documents, tmp_path, capsys):
    train = ["train_tokenizer", str(documents), "--output", str(tmp_path / "t.model"), "--vocab-size", "2000"]
    assert run(train) == 0
    assert re.search(r": [\d,]+ pieces of the 2,000 asked for \(the text has no more\), ", capsys.readouterr().out)


def test_a_key_that_no_row_has_is_one_line(documents, tmp_path, capsys):
    command = ["prepare_data", str(documents), "--tokenizer", str(make_tokenizer(tmp_path).path)]
    command += ["--output", str(tmp_path / "o"), "--workers", "1", "--key", "content"]
    assert run(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "none of the first 20 rows has the key: no field 'content'; allowed for --key: 'text' [MDS422]" in error
    documents.write_text(json.dumps({"content": "a text"}) + "\n" + documents.read_text())
    assert run(command) == 2
    assert "20 bad rows, after which reading ended" in capsys.readouterr().err


def test_a_text_in_place_of_a_prefix_is_said_with_the_command(documents):
    with pytest.raises(DataError, match=r"docs.jsonl: is text, not a prepared prefix; .*--output \S*/docs$"):
        read_info(documents)


def test_max_documents(documents, tmp_path):
    model = make_tokenizer(tmp_path).path
    command = ["prepare_data", str(documents), "--tokenizer", str(model), "--output", str(tmp_path / "o")]
    assert run([*command, "--workers", "1", "--max-documents", "7"]) == 0
    assert read_info(tmp_path / "o").documents == 7


def test_corpus_text_only(tmp_path, capsys):
    assert run(["build_corpus", "--max-bytes", "200000", "--text-only", str(tmp_path / "c.jsonl")]) == 0
    assert (tmp_path / "c.jsonl").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prepare_data", "none.jsonl", "--tokenizer", "t.model", "--output", "o"], "none.jsonl not found"),
        (["prepare_data", "--tokenizer", "t.model", "--output", "o"], "give either input files or --hf"),
        (["prepare_data", str(TOOLS), "--tokenizer", "t.model", "--output", "o"], "no file ending in"),
        (
            ["prepare_data", "x", "--tokenizer", "t", "--output", "o", "--chat-template", "c"],
            "no effect without --chat",
        ),
        (
            ["prepare_data", "x", "--tokenizer", "t", "--output", "o", "--chat", "--key", "k"],
            "--key has no effect with",
        ),
        (["inspect_data", "none"], "no dataset at none"),
        (["train_tokenizer", "none.txt", "--output", "t.model"], "none.txt not found"),
    ],
)
def test_user_errors_end_with_code_2_and_one_message(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def run(command):
    return load(command[0]).main(command[1:])
