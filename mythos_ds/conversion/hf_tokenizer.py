"""A model's tokenizer as transformers reads it: tokenizer.json with the ids of training, and what stands beside it."""

import json
from pathlib import Path
from typing import Any

from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.tokenizer_export import library_tokenizer
from mythos_ds.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_JSON, copy_tokenizer, kind_of
from mythos_ds.data.tokenizer_json import JsonTokenizer
from mythos_ds.io import read_json, write_atomic

_CLASS = "MythosTokenizer"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CONFIG = "tokenizer_config.json"


def write_tokenizer(place: Path, output: Path, *, with_remote_code: bool = False) -> dict[str, int]:
    """tokenizer.json and its companions with the ids of the tokenizer in `place`, a folder or a file; returns the
    special ids.

    A sentencepiece model is kept beside it. Raises DataError where there is no tokenizer.json with the same ids.
    """
    own = Tokenizer.load(place)
    copy_tokenizer(place, output)
    config = {
        **own.companions.config,
        "tokenizer_class": _CLASS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    config.pop("auto_map", None)
    named = {f"{kind}_token": own.companions.named(f"{kind}_token") for kind in _NAMED}
    known = {name: token for name, token in named.items() if token is not None}
    if isinstance(own, JsonTokenizer):
        names = {number: token for token, number in own.special_tokens.items()}
        config |= {"split_special_tokens": True, **known, "eos_token": known.get("eos_token", names[own.eos_id])}
        if kind_of(own.path) != "json":
            write_atomic(output / TOKENIZER_JSON, own.json())
            for name in {SENTENCEPIECE, own.path.name}:
                (output / name).unlink(missing_ok=True)
        elif (content := json.loads(own.json()))["model"].get("dropout"):
            content["model"]["dropout"] = None  # would cut each text another way, each time
            write_atomic(output / TOKENIZER_JSON, json.dumps(content, ensure_ascii=False))
    else:
        config = _of_sentencepiece(own, config, known, output)
    if with_remote_code:
        config["auto_map"] = {"AutoTokenizer": [None, f"tokenization_mythos.{_CLASS}"]}
    write_atomic(output / _CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    ids = {"eos_token_id": own.eos_id}
    ids |= {
        f"{kind}_token_id": own.special_tokens.get(str(_name(config, f"{kind}_token")), -1) for kind in ("bos", "pad")
    }
    return {name: number for name, number in ids.items() if number >= 0}


def write_generation_config(place: Path, output: Path, ids: dict[str, int]) -> None:
    """generation_config.json: the source's own, where it has one, and ends at every id that ends text.

    A batch's shorter texts are filled with the id for padding, or with the first that ends text where there is none.
    """
    path = place / "generation_config.json"
    given = read_json(path) if place.is_dir() and path.is_file() else {}
    ends = sorted(Tokenizer.load(place).ends()) if ids else []
    stop: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    for own in ("transformers_version", "_from_model_config"):
        given.pop(own, None)
    content = {**given, **ids, **stop, "use_cache": True}
    if content.get("pad_token_id") is None and ends:
        content["pad_token_id"] = ends[0]
    write_atomic(output / path.name, json.dumps(content, indent=2) + "\n")


def _name(config: dict[str, Any], name: str) -> Any:
    given = config.get(name) or (config.get("own_special_tokens") or {}).get(name)
    return given.get("content") if isinstance(given, dict) else given


def _of_sentencepiece(own: Tokenizer, config: dict[str, Any], known: dict[str, str], output: Path) -> dict[str, Any]:
    """Writes the model as tokenizer.json; returns tokenizer_config.json.

    Its special tokens are no added tokens there, and have their names under a key of our own: transformers would else
    find them in raw text, where they are text, or with `split_special_tokens` split those that are added later.
    """
    from tokenizers import AddedToken

    found = library_tokenizer(own.path)
    added = sorted((number, token) for token, number in own.special_tokens.items() if token in own.companions.added)
    beyond = {number: token for number, token in added if number >= found.made.get_vocab_size()}
    for number in range(found.made.get_vocab_size(), own.vocab_size):
        token = beyond.get(number, f"<|reserved_token_{number}|>")
        found.made.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    write_atomic(output / TOKENIZER_JSON, found.made.to_str(pretty=True))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (output / name).unlink(missing_ok=True)  # all they say is in tokenizer_config.json then
    pieces = {number: token for token, number in own.special_tokens.items()}
    special: dict[str, Any] = {"unk_token": own.unknown_token(), "eos_token": pieces[own.eos_id]}
    special |= {"pad_token": pieces[own.pad_id]} if own.pad_id >= 0 else {}
    special |= {"bos_token": bos} if (bos := own.begin_token()) is not None else {}
    special |= {name: token for name, token in known.items() if token in own.special_tokens}
    others = [token for token in own.special_tokens if token not in special.values() and token not in beyond.values()]
    for name in (*known, "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "ids_by"):
        config.pop(name, None)
    if others:
        special["extra_special_tokens"] = others
    config["own_special_tokens"] = special
    if own.vocab_size > len(found.made.get_vocab(with_added_tokens=False)):
        config["split_special_tokens"] = True
    return config if found.exact else {**config, "ids_by": "sentencepiece"}
