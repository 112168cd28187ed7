"""Questions on the Python library with its own docstrings as answers: conversations that need no network."""

import importlib
import inspect
import json
import random
from pathlib import Path
from typing import Any

import torch

from mythos_ds.data.chat import encode_chat
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.inference.generate import generate
from mythos_ds.io import write_atomic
from mythos_ds.weights.model_folder import load_model

_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "cmath", "codecs", "collections", "configparser", "contextlib",
    "csv", "datetime", "decimal", "difflib", "dis", "email.message", "fractions", "functools", "gettext", "glob",
    "gzip", "hashlib", "heapq", "html", "inspect", "io", "ipaddress", "itertools", "json", "linecache", "logging",
    "mailbox", "math", "mimetypes", "operator", "os", "os.path", "pathlib", "pickle", "platform", "pprint", "random",
    "re", "sched", "shelve", "shutil", "socket", "sqlite3", "ssl", "statistics", "string", "struct", "subprocess",
    "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "trace", "traceback",
    "typing", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom", "zipfile",
    "zlib",
)  # fmt: skip
_FORMS = ("What does {} do in Python?", "Explain {} in one sentence.", "I read {} in a Python program. What is it for?")
_LONGEST, _MOST_TOKENS, _ASKED = 240, 64, 20


def write_questions(training: Path, held_out: Path) -> None:
    """Write conversations as JSON lines, each about another name, and as a JSON list questions about other names."""
    generator = random.Random(0)
    known = sorted(_answers().items())
    generator.shuffle(known)
    rows = [{"prompt": generator.choice(_FORMS).format(name), "response": answer} for name, answer in known]
    write_atomic(training, "".join(json.dumps(row) + "\n" for row in rows[_ASKED:]))
    write_atomic(held_out, json.dumps([row["prompt"] for row in rows[:_ASKED]], indent=1) + "\n")


def _answers() -> dict[str, str]:
    """The first sentence of what the library says of each of its functions and classes."""
    found: dict[str, str] = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            if 20 <= len(text) <= _LONGEST and text[0].isupper() and text not in found.values():
                found[f"{module_name}.{name}"] = text.rstrip(".") + "."
    return found


@torch.inference_mode()
def answers(model_folder: Path, questions: list[str], loops: int) -> dict[str, Any]:
    """The likeliest answer to each question, and how many of them end with the end of a turn within 64 tokens and hold
    no special token."""
    model, tokenizer = load_model(model_folder), Tokenizer.load(model_folder)
    end, texts, ended = tokenizer.special_tokens["<|im_end|>"], [], 0
    for question in questions:
        prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
        made = generate(
            lambda seen: model(seen, n_loops=loops)[0, -1],
            prompt,
            new_tokens=_MOST_TOKENS,
            vocab_size=tokenizer.vocab_size,
            eos_id=end,
            context_length=len(prompt) + _MOST_TOKENS,
            temperature=0.0,
        )
        special = set(made) & set(tokenizer.special_tokens.values())
        ended += len(made) < _MOST_TOKENS and not special
        texts.append(tokenizer.decode(made))
    return {"loops": loops, "asked": len(questions), "ended": ended, "texts": texts}
