"""Small texts, tokenizers and datasets for tests of the data layer."""

from pathlib import Path

import numpy as np

from mythos_ds.data.dataset_info import DatasetInfo
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.data.tokenizer import Tokenizer, train_tokenizer

SYLLABLES = ("ka", "lo", "mi", "ru", "se", "to", "vi", "na", "pe", "du")
ODD_TEXTS = (
    "plain words, and 12345 digits",
    "  leading and trailing  ",
    "def f(x):\n\treturn  x\n\n\n    # indented\r\n",
    "naive na\u00efve \u4f60\u597d \U0001f642 e\u0301 \u00a0",
    "</s><pad> <unk> <0x41>",
    "a\0b",
    " ",
    "",
)


def make_texts(count: int, *, seed: int = 0, longest: int = 120) -> list[str]:
    """Documents of 1 to `longest` made-up words."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [_text(generator, int(generator.integers(1, longest + 1))) for _ in range(count)]


def _text(generator: np.random.Generator, words: int) -> str:
    drawn = (generator.choice(SYLLABLES, size=generator.integers(1, 4)) for _ in range(words))
    return " ".join("".join(word) for word in drawn) + "\n"


def make_tokenizer(folder: Path, *, vocab_size: int = 400, seed: int = 0) -> Tokenizer:
    """A tokenizer of made-up words in folder/tokenizer.model."""
    return train_tokenizer(make_texts(400, seed=seed), folder / "tokenizer.model", vocab_size=vocab_size)


def make_dataset(prefix: Path, tokenizer: Tokenizer, texts: list[str]) -> DatasetInfo:
    """An indexed dataset of `texts` in their order."""
    return prepare_dataset(texts, tokenizer_path=tokenizer.path, prefix=prefix, shuffle_seed=None)
