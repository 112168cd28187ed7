"""Rows of chat data to conversations in one form, whichever of the usual forms they have; or why a row is none."""

import json
from collections.abc import Callable
from typing import Any

from mythos_ds.data.rows import BadRow, Conversation

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip
"""ShareGPT's names of who speaks."""
_ANSWERS = ("completion", "response")
_LISTS = ("messages", "conversations", "conversation")
_FORMS = "messages; conversations; instruction and output; prompt and completion, or response"
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message that are text."""
_LEVELS = 100


class _RowError(ValueError):
    """A row is no conversation. detail: what was found."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def conversation_of(row: Any, where: str) -> Conversation | BadRow:
    """The conversation that a row holds, told by its keys: "messages" (OpenAI), "conversations" or "conversation"
    (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and "completion" or "response"; other keys say nothing.
    A BadRow where it has no known form, a role is unknown, or no answer of the assistant ends it."""
    if isinstance(row, BadRow):
        return row
    try:
        if not isinstance(row, dict):
            raise _RowError("a row of named values is needed", f"{type(row).__name__} given")
        row = _without_null(row)
        read = next((read for known, read in _READERS if known(row)), None)
        if read is None:
            keys = ", ".join(repr(key[:40]) for key in list(row)[:10]) or "none"
            raise _RowError("no conversation of a known form", f"keys given: {keys}; allowed: {_FORMS}")
        messages = read(row)
        if messages and messages[0]["role"] != "system" and isinstance(row.get("system"), str) and row["system"]:
            messages = [{"role": "system", "content": row["system"]}, *messages]
        _check(messages)
        content: dict[str, Any] = {"messages": messages}
        if tools := _tools(row.get("tools")):
            content["tools"] = tools
        _check_levels(content, _LEVELS)
        # Tables hold dates and other values that JSON has not: beside the messages' texts, where few templates look.
        return Conversation(where, json.dumps(content, ensure_ascii=False, default=str))
    except _RowError as error:
        return BadRow(where, error.reason, error.detail)
    except RecursionError:
        return BadRow(where, *_TOO_DEEP)
    except (TypeError, ValueError) as error:
        return BadRow(where, "a row that JSON cannot hold", str(error))


_TOO_DEEP = "lists and objects within each other are too deep", f"allowed: {_LEVELS} levels"


def _check_levels(value: Any, levels: int) -> None:
    if not levels:
        raise _RowError(*_TOO_DEEP)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_levels(item, levels - 1)


def _without_null(value: Any) -> Any:
    """The value without keys that hold null: tables give every row the keys of all."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _messages(given: Any, key: str) -> list[dict[str, Any]]:
    """Messages, under OpenAI's names (role, content) or ShareGPT's (from, value)."""
    given = _from_json(given)
    if not isinstance(given, list) or not given:
        raise _RowError(f"{key} is no list of messages", f"{type(given).__name__} given")
    return [_message(each, number) for number, each in enumerate(given)]


def _message(given: Any, number: int) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _RowError("a message is no object", f"message {number}: {type(given).__name__} given")
    made = dict(given)
    if "role" not in made and "from" in made:
        speaker = made.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise _RowError("unknown role", f"message {number}: {speaker!r} given; allowed: {', '.join(_SPEAKERS)}")
        made["role"] = _SPEAKERS[speaker]
        made["content"] = made.pop("value", None)
    if made.get("role") not in _ROLES:
        raise _RowError("unknown role", f"message {number}: {made.get('role')!r} given; allowed: {', '.join(_ROLES)}")
    calls = made.get("tool_calls")
    if calls is not None:
        made["tool_calls"] = _calls(calls, number)
    made["content"] = _content(made.get("content"), number, optional=bool(calls))
    return made


def _content(given: Any, number: int, *, optional: bool) -> str:
    if isinstance(given, str):
        return given
    if given is None and optional:
        return ""
    if isinstance(given, list) and given:
        return "".join(_part(part, number) for part in given)
    raise _RowError("a message has no text", f"message {number}: content is {type(given).__name__}")


def _part(given: Any, number: int) -> str:
    if isinstance(given, str):
        return given
    kind = given.get("type", "text") if isinstance(given, dict) else type(given).__name__
    if kind not in _TEXT_PARTS:
        raise _RowError("a message holds more than text", f"message {number}: {str(kind)[:40]!r}")
    if not isinstance(given.get("text"), str):
        raise _RowError("a message has no text", f"message {number}: a part of it has none")
    return str(given["text"])


def _calls(given: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as templates take them; OpenAI writes them as JSON text."""
    given = _from_json(given)
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise _RowError("tool_calls is no list of objects", f"message {number}")
    made = []
    for call in given:
        call = dict(call)
        inner = call.get("function")
        holder = dict(inner) if isinstance(inner, dict) else call
        if "arguments" in holder:
            holder["arguments"] = _from_json(holder["arguments"])
        made.append({**call, "function": holder} if isinstance(inner, dict) else holder)
    return made


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = _from_json(given)
    if tools is None or tools == "" or tools == []:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _RowError("tools is no list of objects", f"{type(tools).__name__} given")
    return tools


def _from_json(given: Any) -> Any:
    """What a text of JSON holds, where it is one: columns of tables hold lists and objects so."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise _RowError("instruction or input is no text")
    asked = "\n\n".join(part for part in parts if part.strip())
    return [_spoken("user", asked), _spoken("assistant", row["output"])]


def _prompted(row: dict[str, Any]) -> list[dict[str, Any]]:
    answer = next(key for key in _ANSWERS if key in row)
    return _side(row["prompt"], "prompt", "user") + _side(row[answer], answer, "assistant")


def _side(given: Any, key: str, role: str) -> list[dict[str, Any]]:
    """One message of a text, or the messages of a list; a text that is JSON of anything else is a text."""
    found = _from_json(given)
    if isinstance(given, list) or (isinstance(found, list) and found and all(map(_is_message, found))):
        return _messages(found, key)
    return [_spoken(role, given)]


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and not {"role", "from"}.isdisjoint(given)


def _spoken(role: str, text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise _RowError("a message has no text", f"the {role}'s is {type(text).__name__}")
    return {"role": role, "content": text}


_READERS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], list[dict[str, Any]]]], ...] = (
    *((lambda row, key=key: key in row, lambda row, key=key: _messages(row[key], key)) for key in _LISTS),
    (lambda row: "instruction" in row and "output" in row, _alpaca),
    (lambda row: "prompt" in row and any(key in row for key in _ANSWERS), _prompted),
)
"""What tells a form, and how it is read; a row of several is of the first."""


def _check(messages: list[dict[str, Any]]) -> None:
    """Raises _RowError for a conversation from which no answer, or half a one, could be learnt."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise _RowError("a turn of the assistant is empty", f"message {number}")
        if message.get("weight") not in (None, 1) and message["role"] == "assistant":
            raise _RowError("a turn of the assistant has a weight of its own", f"message {number}: allowed: 1")
    if messages[-1]["role"] != "assistant":
        raise _RowError("the last turn is not the assistant's", f"it is the {messages[-1]['role']}'s: nothing answers")
