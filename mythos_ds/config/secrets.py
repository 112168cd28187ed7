"""Secrets that a configuration must not hold: it is copied into the run's directory and its checkpoints."""

import re
from typing import Any

from mythos_ds.errors import Coded, Problem

_SECRET_KEY = re.compile(
    r"(api|access|private|secret|experiment|auth|wandb|comet|hf|ssh|signing|encryption)_?key|token$|secret|passw|"
    r"passphrase|(^|_)pwd$|bearer|credential",
    re.I,
)
_NO_SECRETS = frozenset({"max_tokens", "sample_tokens"})
_IN_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@")
_LOOKS_LIKE_ONE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|"
    r"xox[abpr]-[A-Za-z0-9-]{20,})"
)
_VARIABLES = {"comet": "COMET_{}", "wandb": "WANDB_{}"}
_HEAD = "a secret does not belong in a configuration, which is copied into the run's directory and its checkpoints"


def is_secret(key: str, value: Any) -> bool:
    """Whether a setting of that name holds a secret."""
    if isinstance(value, list):
        return any(is_secret(key, item) for item in value)
    return isinstance(value, str) and value != "" and bool(_SECRET_KEY.search(key)) and key not in _NO_SECRETS


def secrets(value: Any, at: str = "") -> list[Problem]:
    """(key path, message) of each secret in a configuration's JSON values; the message does not repeat it."""
    if isinstance(value, dict):
        found: list[Problem] = []
        for key, item in value.items():
            here = f"{at}.{key}" if at else key
            found += [told(here)] if is_secret(key, item) else secrets(item, here)
        return found
    if isinstance(value, list):
        return [problem for index, item in enumerate(value) for problem in secrets(item, f"{at}[{index}]")]
    if not isinstance(value, str):
        return []
    if _IN_ADDRESS.search(value):
        return [(at, Coded("MDS110", f"an address with a password given; {_HEAD}; leave the password out of it"))]
    return [told(at)] if _LOOKS_LIKE_ONE.search(value) else []


def told(at: str) -> Problem:
    """The problem of a secret at a key path."""
    *_, section, key = ["", *at.split(".")]
    name = _VARIABLES.get(section)
    how = f"set the environment variable {name.format(key.upper())}" if name else "give it in an environment variable"
    return at, Coded("MDS110", f"{_HEAD}; remove it, and {how}")
