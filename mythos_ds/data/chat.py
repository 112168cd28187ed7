"""Conversations to ids: a chat template's own special tokens are tokens, everything that people wrote is text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError
from mythos_ds.io import read_json

Message = Mapping[str, Any]
"""A turn: its "role", its "content" and what else the template reads."""


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a conversation in the model's chat template, up to where the model is to answer.

    template: Jinja; that of the files beside the tokenizer where None. Raises DataError where there is none, where it
    refuses the messages, and where it decides by special tokens inside of them.
    """
    template = template or tokenizer.companions.chat_template()
    if template is None:
        raise DataError(
            f"{tokenizer.path}: has no chat template; allowed: a model whose folder has chat_template.jinja, or "
            '"chat_template" in tokenizer_config.json'
        )
    try:
        from mythos_hf.tokenization_mythos import ChatMarks
    except ImportError as error:
        raise DataError("chat templates need an extra: pip install 'mythos_ds[hf]'") from error
    symbols = tokenizer.symbols()
    written = [symbol for symbol in symbols if symbol in template and not symbol.isspace()]
    marks = ChatMarks(tokenizer.special_tokens, messages, tools, template, symbols=written)
    known = symbols | tokenizer.special_tokens
    given = {"add_generation_prompt": add_generation_prompt, "chat_template": template}
    plain = _rendered(tokenizer, list(messages), tools=tools, **given)
    for mark in (marks.mark, marks.mark_but_answers):
        rendered = _rendered(tokenizer, mark(list(messages)), tools=marks.mark(tools), **given)
        kept = marks.plain(rendered) == plain and not marks.torn(rendered)
        if kept:
            break
    if not kept:
        raise DataError(
            f"{tokenizer.path}: its chat template decides by special tokens inside of messages, where they are text; "
            f"allowed: messages without {', '.join(marks.special)}"
        )
    ids: list[int] = []
    for number, (is_token, run) in enumerate(marks.runs(rendered)):
        if is_token:
            ids.append(known[run])
            continue
        first, *rest = marks.cut(run)
        ids += tokenizer.encode(first) if number == 0 else tokenizer.encode_after(first)
        for piece in rest:
            ids += tokenizer.encode_on(piece)
    return ids


def _rendered(tokenizer: Tokenizer, messages: list[Any], **options: Any) -> str:
    """The text that a template makes of messages, with the names of the tokenizer's special tokens."""
    from transformers.utils.chat_template_utils import render_jinja_template

    kinds = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = {kind: tokenizer.companions.named(kind) for kind in kinds}
    by_id = {number: token for token, number in tokenizer.special_tokens.items()}
    named["eos_token"] = named["eos_token"] or by_id.get(tokenizer.eos_id)
    named["bos_token"] = named["bos_token"] or tokenizer.begin_token()
    variables: dict[str, Any] = {name: token for name, token in named.items() if token is not None}
    try:
        made: Any = render_jinja_template(conversations=[[*map(dict, messages)]], **options, **variables)
    except Exception as error:  # what a template does is its author's
        raise DataError(f"{tokenizer.path}: its chat template does not take these messages ({error})") from None
    return str(made[0][0])


def read_messages(path: Path) -> list[Message]:
    """A conversation from a JSON file: a list of messages, or an object with "messages". Raises DataError."""
    content = read_json(path, Any, DataError)
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{path}: allowed: a list of messages, such as [{{"role": "user", "content": "Hello"}}]')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise DataError(f'{path}: message {number}: allowed: an object with "role" and "content"')
    return messages
