"""tokenizer.json gives the ids of the sentencepiece model, whichever kind that is."""

import json
import random

import pytest

transformers = pytest.importorskip("transformers")
from mythos_ds.conversion.hf_tokenizer import write_generation_config, write_tokenizer
from mythos_ds.data.tokenizer import Tokenizer, train_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.tokenizers import sentencepiece_model

SOURCES = sorted((ROOT / "mythos_ds").rglob("*.py"))
ODD = ["</s>", "<s>", "<unk>", "<pad>", "<0x0A>", "\x00", "\t", "\n", "\r\n", "\u2581", "\u200b", "\U0001f642", "漢"]


def samples():
    """Code, and strings of rare characters, runs of spaces and pieces that no text gives."""
    generator = random.Random(0)
    alphabet = [*map(chr, range(0x20, 0x180)), *ODD, *[" "] * 60, *["\n"] * 20]
    yield from (path.read_text(encoding="utf-8") for path in SOURCES[:20])
    yield from ("", " ", "  \n    x\n", "x" * 300)
    for _ in range(500):
        yield "".join(generator.choices(alphabet, k=generator.randrange(60)))


@pytest.mark.parametrize("kind", ["the tiny model's", "bpe", "unigram"])
def test_ids_and_text_are_the_same(kind, tmp_path):
    path = ROOT / "models" / "tiny" / "tokenizer.model"
    if kind in ("bpe", "unigram"):
        path = tmp_path / "tokenizer.model"
        documents = [source.read_text(encoding="utf-8") for source in SOURCES[20:60]]
        train_tokenizer(documents, path, vocab_size=800, kind=kind)
    ids = write_tokenizer(path, tmp_path / "hf")
    fast, own = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer.load(path)
    assert (fast.eos_token_id, fast.pad_token_id) == (own.eos_id, own.pad_id)
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (own.eos_id, own.pad_id)
    ties = 0
    for text in samples():
        encoded, found = own.encode(text), fast(text).input_ids
        if kind == "unigram" and found != encoded:
            # Two orders of the same pieces have the same score, and each library takes another: "\n\n\n" "\n".
            assert sorted(found) == sorted(encoded), text[:60]
            ties += 1
        else:
            assert found == encoded, text[:60]
        assert fast.decode(encoded) == own.decode(encoded), text[:60]
    assert ties <= 2


@pytest.mark.parametrize(("given", "filled"), [(None, 2), ({"pad_token_id": None}, 2), ({"pad_token_id": 7}, 7)])
def test_without_a_token_for_padding_a_batch_is_filled_with_the_one_that_ends_text(given, filled, tmp_path):
    place = tmp_path / "own"
    sentencepiece_model(place / "tokenizer.model", "bpe")
    if given is not None:
        (place / "generation_config.json").write_text(json.dumps(given))
    (tmp_path / "hf").mkdir()
    ids = write_tokenizer(place, tmp_path / "hf")
    write_generation_config(place, tmp_path / "hf", ids)
    made = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (made.eos_token_id, made.pad_token_id, ids) == (2, filled, {"eos_token_id": 2, "bos_token_id": 1})
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token is None
