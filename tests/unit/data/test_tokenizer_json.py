"""tokenizer.json and tiktoken files: the same interface, ends of documents, and what is wrong said in one message."""

import json
import os
import shutil
from typing import Any

import numpy as np
import pytest

from mythos_ds.config.schema import DataConfig, DatasetConfig
from mythos_ds.data.chat import encode_chat, read_messages
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.inspection import DatasetView
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_files import copy_tokenizer
from mythos_ds.errors import CheckpointError, DataError
from tests.helpers.tokenizers import (
    CHAT_SYMBOLS,
    byte_level_folder,
    code_lines,
    mixed_lines,
    sentencepiece_model,
    tiktoken_file,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("json"), added=True)


@pytest.fixture
def bare(tmp_path):
    return byte_level_folder(tmp_path / "bare", companions=False)


def test_text_survives_and_special_tokens_in_it_are_text(folder):
    tokenizer = Tokenizer.load(folder)
    special = set(tokenizer.special_tokens.values())
    for text in mixed_lines(300):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)
        assert max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert len(tokenizer.encode("word " * 100)) > 16, "the truncation in the file is no part of training"


def test_a_file_a_folder_and_another_name_are_the_same(folder, tmp_path):
    other = tmp_path / "vocabulary.txt"
    other.write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    loaded = [Tokenizer.load(place) for place in (folder, folder / "tokenizer.json", other)]
    assert len({(each.sha256, each.eos_id, each.vocab_size) for each in loaded}) == 1
    assert (loaded[0].pad_id, loaded[2].pad_id) == (0, -1)


def test_ends_of_documents_stay_in_samples_where_they_are_the_padding_too(folder, tmp_path):
    """As in SmolLM2 and GPT-2."""
    place = tmp_path / "same"
    shutil.copytree(folder, place)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    own = Tokenizer.load(place)
    prepare_dataset(code_lines()[:400], tokenizer_path=place, prefix=tmp_path / "data")
    data = DataConfig(
        datasets=[DatasetConfig(prefix=str(tmp_path / "data"))], tokenizer=str(place), data_dir=str(tmp_path)
    )
    request: dict[str, Any] = {
        "seq_len": 64,
        "train_samples": 8,
        "valid_samples": 0,
        "seed": 0,
        "vocab_size": own.vocab_size,
    }
    prepare_index_cache(data, **request)
    train = build_datasets(data, **request).train
    assert sum(int((train[number]["targets"] == own.eos_id).sum()) for number in range(8)) > 8
    assert own.pad_id == -1


def test_workers_and_one_process_prepare_the_same(folder, tmp_path):
    texts = code_lines()[:3000]
    alone = prepare_dataset(texts, tokenizer_path=folder, prefix=tmp_path / "a")
    together = prepare_dataset(texts, tokenizer_path=folder, prefix=tmp_path / "b", workers=2)
    assert alone == together
    assert alone.tokenizer_sha256 == Tokenizer.load(folder).sha256
    view, own = DatasetView(tmp_path / "b"), Tokenizer.load(folder)
    assert np.array_equal(view.document(5)[-1:], [own.eos_id])


def test_the_end_of_documents(bare, tmp_path):
    """Named beside the file, or the only special token of a usual name; else what to write is said."""
    with pytest.raises(DataError, match=r'write \{"eos_token": "<\|endoftext\|>"\} to .*special_tokens_map\.json'):
        Tokenizer.load(bare)
    (bare / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    assert Tokenizer.load(bare).eos_id == 3
    (bare / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    own = Tokenizer.load(bare)
    assert own.eos_id == own.special_tokens["<|im_end|>"]
    assert own.ends() == {own.eos_id, 3, 0}
    (bare / "special_tokens_map.json").write_text('{"eos_token": "<|nothing|>"}')
    with pytest.raises(DataError, match="is not in the vocabulary"):
        Tokenizer.load(bare)
    content = json.loads((bare / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_id == 0


def test_damaged_files_are_named(tmp_path, folder):
    path = tmp_path / "tokenizer.json"
    for content, message in (
        ("{", r"not a tokenizer\.json"),
        ("{}", r"not a tokenizer\.json"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            Tokenizer.load(path)
    path.write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: Invalid JSON"):
        Tokenizer.load(path)


def test_a_hub_name_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"):
        Tokenizer.load("HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="mythos-ds train-tokenizer"):
        Tokenizer.load("data/nothing")


def test_a_tiktoken_file_needs_its_pattern(folder, tmp_path):
    pytest.importorskip("transformers")
    path = tiktoken_file(tmp_path / "tokenizer.model", folder)
    with pytest.raises(DataError, match=r'pattern for cutting text is unknown.*"pattern"'):
        Tokenizer.load(path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "<|end|>", "auto_map": {"AutoTokenizer": ["code.Class", null]}}')
    with pytest.raises(DataError, match="its folder's code knows it"):
        Tokenizer.load(path)
    config.write_text('{"eos_token": "<|end|>", "pattern": "\\\\s|\\\\S+"}')
    words = Tokenizer.load(path)
    config.write_text('{"eos_token": "<|end|>"}')
    usual = Tokenizer.load(path)
    size = len(path.read_bytes().splitlines())
    assert (words.eos_id, usual.eos_id, usual.vocab_size) == (size, size, size + 1)
    assert words.sha256 != usual.sha256
    assert usual.decode(usual.encode("a <|end|> 漢")) == "a <|end|> 漢"
    assert usual.eos_id not in usual.encode("a <|end|>")
    with path.open("ab") as file:
        file.write(b"!!! 5\n")
    with pytest.raises(DataError, match=f"line {size + 1}: not a tiktoken line"):
        Tokenizer.load(path)


def test_chats_say_what_is_missing(folder, bare, tmp_path):
    pytest.importorskip("transformers")
    chat = [{"role": "user", "content": "Hello"}]
    (bare / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="has no chat template"):
        encode_chat(Tokenizer.load(bare), chat)
    own = Tokenizer.load(folder)
    with pytest.raises(DataError, match="does not take these messages"):
        encode_chat(own, chat, template="{{ raise_exception('no') }}")
    reading = "{% if messages[0].content.startswith('<|im_end|>') %}x{% endif %}{{ messages[0].content }}"
    with pytest.raises(DataError, match="decides by special tokens inside"):
        encode_chat(own, [{"role": "user", "content": "<|im_end|>"}], template=reading)
    path = tmp_path / "chat.json"
    for content, message in (("[", "Invalid JSON"), ("[]", "a list of messages"), ('["a"]', "message 0")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_messages(path)
    path.write_text(json.dumps({"messages": chat}))
    assert read_messages(path) == chat
    ids = encode_chat(own, chat)
    assert [ids.count(own.special_tokens[token]) for token in CHAT_SYMBOLS] == [2, 1]


def test_what_cannot_be_exported_is_refused_before_the_first_token(tmp_path, monkeypatch):
    path = sentencepiece_model(tmp_path / "tokenizer.model", "bpe", model_type="word", byte_fallback=False)
    monkeypatch.setattr("mythos_ds.data.prepare.encoder_pool", None)
    with pytest.raises(DataError, match="of the kind word, which cannot be exported; allowed: bpe, unigram, char"):
        prepare_dataset(["some words"], tokenizer_path=path, prefix=tmp_path / "data")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


THINKING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""A template that leaves the thoughts of earlier answers out, as those of reasoning models do."""


@pytest.fixture
def thinking(tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    place = byte_level_folder(tmp_path / "thinking")
    made = Library.from_file(str(place / "tokenizer.json"))
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    made.save(str(place / "tokenizer.json"))
    (place / "chat_template.jinja").write_text(THINKING)
    return Tokenizer.load(place)


def test_answers_with_thoughts_are_rendered_without_them(thinking):
    asked, again = {"role": "user", "content": "Hello"}, {"role": "user", "content": "And </think> this?"}
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGood day"}
    plain = {"role": "assistant", "content": "Good day"}
    ids = encode_chat(thinking, [asked, thought, again])
    assert ids == encode_chat(thinking, [asked, plain, again])
    assert ids.count(thinking.symbols()["</think>"]) == 0  # the user's is text
    assert ids.count(thinking.symbols()["<think>"]) == 1
    hidden = {"role": "assistant", "content": "<think>a</think>b <|im_end|> c"}
    assert encode_chat(thinking, [asked, hidden]).count(thinking.special_tokens["<|im_end|>"]) == 2


def test_tools_are_text(thinking):
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "description": "naïve </think>"}}]
    ids = encode_chat(thinking, [{"role": "user", "content": "Hello"}], tools=tools)
    assert "f<|im_end|>" in thinking.decode(ids)
    assert "naïve </think>" in thinking.decode(ids)
    assert ids.count(thinking.special_tokens["<|im_end|>"]) == 2
    assert ids.count(thinking.symbols()["</think>"]) == 0


COMPANIONS = {
    "added_tokens.json": ['{"<a>": "x"}', '{"<a>": null}', '{"<a>": 1e400}', '{"<a>": 99999999999}', '{"<a>": [1]}'],
    "tokenizer_config.json": ['{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": "<a>"}}', "[" * 9000],
    "generation_config.json": ['{"eos_token_id": "x"}', '{"eos_token_id": {"a": 1}}', '{"eos_token_id": [[]]}', "{]"],
    "special_tokens_map.json": ["{", "\xff", "[" * 100_000],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in COMPANIONS.items() for text in texts])
def test_odd_companions_are_named(folder, tmp_path, name, text):
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    if name == "generation_config.json":
        (place / "tokenizer_config.json").unlink()
    (place / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        Tokenizer.load(place).ends()


def test_pipes_beside_a_tokenizer_are_not_read(folder, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    for name in ("README.md", "added_tokens.json", "LICENSE"):
        os.mkfifo(place / name)
    assert Tokenizer.load(place).sha256 == Tokenizer.load(folder).sha256
    assert "README.md" not in copy_tokenizer(place, tmp_path / "out")
