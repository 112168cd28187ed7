"""Tokenizers: lossless, the same on every training, and clear about what is wrong."""

import pytest

from mythos_ds.data.tokenizer import Tokenizer, train_tokenizer
from mythos_ds.errors import DataError
from tests.helpers.paths import ROOT
from tests.helpers.text_data import ODD_TEXTS, make_texts, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_source_file_of_the_package_survives(tokenizer):
    for path in sorted((ROOT / "mythos_ds").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text, path


def test_lone_surrogate_becomes_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_special_ids_never_come_from_text(tokenizer):
    ids = {i for text in (*ODD_TEXTS, *make_texts(50)) for i in tokenizer.encode(text)}
    assert tokenizer.eos_id not in ids
    assert tokenizer.pad_id not in ids
    assert max(ids) < tokenizer.vocab_size


def test_training_is_deterministic(tokenizer, tmp_path):
    assert make_tokenizer(tmp_path).sha256 == tokenizer.sha256
    assert make_tokenizer(tmp_path, vocab_size=410).sha256 != tokenizer.sha256


def test_long_lines_are_learnt_from(tmp_path):
    line = "".join(make_texts(300)).replace("\n", " ")
    assert train_tokenizer([line], tmp_path / "t.model", vocab_size=350).vocab_size == 350


def test_missing_model_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"not found.*mythos-ds train-tokenizer"):
        Tokenizer.load(tmp_path / "none.model")


def test_other_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_text("no model", encoding="utf-8")
    with pytest.raises(DataError, match="no sentencepiece model"):
        Tokenizer.load(path)


def test_too_little_text(tmp_path):
    with pytest.raises(DataError, match="cannot train a tokenizer"):
        train_tokenizer([], tmp_path / "t.model", vocab_size=400)
