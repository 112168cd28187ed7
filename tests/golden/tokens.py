"""The text of the golden runs: made-up words drawn from a chain, so that there is something to learn and no corpus."""

import random
from pathlib import Path

from mythos_ds.data.prepare import prepare_dataset
from tests.helpers.paths import ROOT

TOKENS = ROOT / "tests" / "golden" / "tokens"
"""Prefix of the committed files."""
TOKENIZER = ROOT / "models" / "tiny" / "tokenizer.model"
_DOCUMENTS = 240
_WORDS = 500
_FOLLOWERS = 6
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea")


def write_tokens(prefix: Path) -> None:
    """Write the dataset, the same bytes wherever it is done."""
    prepare_dataset(_documents(), tokenizer_path=TOKENIZER, prefix=prefix, shuffle_seed=None)


def _documents() -> list[str]:
    """Documents of 20 to 120 words; each word is followed by one of a few."""
    # Only random(), whose numbers no Python version may change.
    generator = random.Random(0)

    def below(limit: int) -> int:
        return int(generator.random() * limit)

    def syllable() -> str:
        return _ONSETS[below(len(_ONSETS))] + _VOWELS[below(len(_VOWELS))]

    words = ["".join(syllable() for _ in range(1 + below(3))) for _ in range(_WORDS)]
    followers = [[below(_WORDS) for _ in range(_FOLLOWERS)] for _ in words]
    documents = []
    for _ in range(_DOCUMENTS):
        word, text = below(_WORDS), []
        for _ in range(20 + below(101)):
            text.append(words[word])
            word = followers[word][min(below(_FOLLOWERS), below(_FOLLOWERS))]
        documents.append(" ".join(text) + ".\n")
    return documents
