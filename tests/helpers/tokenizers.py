"""Small tokenizers of every kind, trained in seconds, and lines of text that tell them apart."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

CHAT_SYMBOLS = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bpe": {"add_dummy_prefix": False},
    "unigram": {"add_dummy_prefix": False, "model_type": "unigram"},
    "llama": {"split_digits": True},
    "gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581"]},
    "t5": {
        "model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "chat symbols": {"add_dummy_prefix": False, "user_defined_symbols": CHAT_SYMBOLS},
    "chat symbols after a space": {"user_defined_symbols": CHAT_SYMBOLS},
    "defaults": {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "space behind": {"treat_whitespace_as_suffix": True},
    "characters": {"model_type": "char", "add_dummy_prefix": False},
}  # fmt: skip
"""Kinds of sentencepiece models, by what is unlike the first."""

_PARTS = [
    "naïve", "Straße", "漢字", "ｶﾞｷﾞ", "ﬁne", "①②", "e\u0301", "a\u0301\u0302", "\U0001f642", "❤\ufe0f", "\u200b",
    "\U0001f469\u200d\U0001f467", "\ufeff", "\x00", "\x07", "\x1b[0m", "\r\n", "\t", "  ", "    ", "\n\n", "\n",
    "\n\n\n", "</s>", "<s>", "<unk>", "<pad>", *CHAT_SYMBOLS, "<|endoftext|>", "<0x0A>", "\u2581", "\u00a0", "\u3000",
    "hello", "world", "1234567", "x=1;", "क्षि", "½", "مرحبا", "<tool>", "[INST]",
]  # fmt: skip


def code_lines() -> list[str]:
    """Lines of the package's own source."""
    files = sorted((ROOT / "mythos_ds").rglob("*.py"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def mixed_lines(count: int = 2000, *, seed: int = 0) -> list[str]:
    """Code, words of many scripts, emoji, control characters and special strings, alone and in any order."""
    generator, code = random.Random(seed), code_lines()
    lines = []
    for _ in range(count):
        kind = generator.random()
        parts = generator.choices(_PARTS, k=generator.randint(1, 12))
        mixed = "".join(part + generator.choice(["", " ", ""]) for part in parts)
        lines.append(generator.choice(code) if kind < 0.3 else parts[0] if kind < 0.4 else mixed)
    return lines


def sentencepiece_model(path: Path, kind: str, **changes: Any) -> Path:
    """A sentencepiece model of one of the kinds, with `changes` of the trainer's options."""
    import sentencepiece

    options: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 1000, "hard_vocab_limit": False, "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1, "minloglevel": 2,
    }  # fmt: skip
    made = io.BytesIO()
    lines = [line for line in code_lines()[:6000] if line.strip()]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_writer=made, **{**options, **SENTENCEPIECE[kind], **changes}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.getvalue())
    return path


def byte_level_folder(folder: Path, *, added: bool = False, companions: bool = True) -> Path:
    """A folder with tokenizer.json, byte-level BPE as in SmolLM2, and the files beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *CHAT_SYMBOLS, "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(code_lines()[:6000], trainer)
    if added:
        made.add_special_tokens([AddedToken("<pad>", special=True)])
        made.add_tokens([AddedToken("<tool>", special=False), AddedToken("hello", special=False, single_word=True)])
    folder.mkdir(parents=True, exist_ok=True)
    made.enable_truncation(16)  # left behind by a training, as in many published files
    made.save(str(folder / "tokenizer.json"))
    if companions:
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    return folder


def tiktoken_file(path: Path, source: Path) -> Path:
    """A tiktoken file with the tokens of a byte-level tokenizer.json."""
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes(byte_of[letter] for letter in token) for token in vocabulary if not token.startswith(("<|", "</s"))]
    tokens.sort(key=lambda token: (len(token) > 1, vocabulary.get(token, 0), len(token)))
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
