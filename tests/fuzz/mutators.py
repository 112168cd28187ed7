"""Ways to damage input: values inside JSON, bytes of any file, and what lies where a file should be."""

import copy
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """What was done. `key`: the last name of the place in a JSON value; None for bytes."""

    what: str
    key: str | None = None


HUGE = (2**31, 2**63, 10**12, 10**18, 10**60, -1, -(2**63), 0, 1, 3, 999_983)
FRACTIONS = (0.5, -0.0, 1e300, 5e-324, 1e-300, float("nan"), float("inf"), -float("inf"))
TEXTS = ("", "x", "a\0b", "\ud800", "../" * 20 + "etc/passwd", "/dev/zero", "a" * 300, "\ufeff", "true", "1", "é" * 50,
         "$(touch {canary})", "`touch {canary}`", "'; touch {canary}; '", "\nkey: value\n", "a\nb", "%s%n", "{}", "*",
         "https://me:pw@host/x", "-" * 3, "#x", "~root", "\x1b[31m", "\u202e")  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": 0}, [1, "a"])


def any_value(generator: random.Random, canary: str) -> Any:
    """A value of some type that is hardly ever right."""
    kind = generator.randrange(5)
    if kind == 0:
        return generator.choice(HUGE)
    if kind == 1:
        return generator.choice(FRACTIONS)
    if kind == 2:
        return any_text(generator, canary)
    if kind == 3:
        return nested(generator.choice([3, 70, 900]))
    return copy.deepcopy(generator.choice(OTHERS))


def any_text(generator: random.Random, canary: str) -> str:
    """A text that some reader may trip over."""
    return generator.choice(TEXTS).replace("{canary}", canary)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutated_json(content: Any, generator: random.Random, canary: str) -> tuple[bytes, Mutation]:
    """The text of JSON that differs at one place, or is damaged as text."""
    if generator.random() < 0.25:
        damaged, what = mutated_bytes(json.dumps(content).encode(), generator)
        return damaged, what
    content = copy.deepcopy(content)
    parent, key, name = generator.choice(_places(content))
    way = generator.choice(["value", "value", "value", "value", "remove", "add", "twice", "digits", "deep"])
    if way == "remove":
        del parent[key]
    elif way == "add" and isinstance(parent, dict):
        name = generator.choice(["unknown", "", "\ud800", "a\0", "__class__", "max_steps", f"{name}s"])
        parent[name] = any_value(generator, canary)
    elif way in ("digits", "deep", "twice"):
        parent[key] = "@HERE@"
    else:
        parent[key] = any_value(generator, canary)
    text = json.dumps(content)
    put = {"digits": "9" * generator.choice([60, 400, 5000]), "deep": "[" * 20_000 + "]" * 20_000}
    if way in put:
        text = text.replace('"@HERE@"', put[way])
    elif way == "twice":
        text = text.replace('"@HERE@"', f'1, "{name}": 2' if isinstance(parent, dict) else "1")
    return text.encode("utf-8", "surrogatepass"), Mutation(f"json {way}", name)


def _places(value: Any, inside: str = "") -> list[tuple[Any, Any, str]]:
    """(parent, key or index, last name) of everything inside a JSON value."""
    found: list[tuple[Any, Any, str]] = []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items:
        name = str(key) if isinstance(value, dict) else inside
        found.append((value, key, name))
        found += _places(item, name)
    return found


def mutated_bytes(content: bytes, generator: random.Random) -> tuple[bytes, Mutation]:
    """Bytes that differ from `content`."""
    way = generator.choice(["cut", "flip", "flip", "junk", "empty", "twice", "zeros", "bom", "utf-16", "long", "swap"])
    at = generator.randrange(max(1, len(content)))
    if way == "cut":
        content = content[:at]
    elif way == "flip":
        changed = bytearray(content or b"\0")
        for _ in range(generator.choice([1, 1, 8])):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        content = bytes(changed)
    elif way == "junk":
        content = content[:at] + generator.randbytes(generator.choice([1, 8, 200])) + content[at:]
    elif way == "empty":
        content = b""
    elif way == "twice":
        content = content + content
    elif way == "zeros":
        content = content[:at] + bytes(len(content) - at)
    elif way == "bom":
        content = generator.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + content
    elif way == "utf-16":
        content = content.decode("latin-1").encode("utf-16")
    elif way == "long":
        content = content[:at] + b"9" * 6000 + content[at:]
    else:
        half = len(content) // 2
        content = content[half:] + content[:half]
    return content, Mutation(f"bytes {way}")


PLACES = ("missing", "folder", "pipe", "loop", "device", "dangling", "hole")


def misplace(path: Path, generator: random.Random) -> Mutation:
    """Something else where a file was: nothing, a folder, a named pipe, links, an endless device, 128 MiB of
    nothing."""
    way = generator.choice(PLACES)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "dangling":
        path.symlink_to("nowhere")
    elif way == "hole":
        with path.open("wb") as file:
            file.truncate(1 << 27)
    return Mutation(f"place {way}")


def mutate_file(path: Path, generator: random.Random, canary: str) -> Mutation:
    """Damage a file where it lies; JSON by its values."""
    if generator.random() < 0.12:
        return misplace(path, generator)
    content = path.read_bytes()
    if path.suffix == ".json":
        changed, mutation = mutated_json(json.loads(content), generator, canary)
    else:
        changed, mutation = mutated_bytes(content, generator)
    path.write_bytes(changed)
    return mutation
