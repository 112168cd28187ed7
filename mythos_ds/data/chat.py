"""Conversations to ids: a chat template's own special tokens are tokens, everything that people wrote is text; and
which of the ids are the assistant's."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.data.tokenizer import Span, Tokenizer
from mythos_ds.errors import DataError
from mythos_ds.io import read_json

if TYPE_CHECKING:
    from mythos_hf.tokenization_mythos import ChatMarks

Message = Mapping[str, Any]
"""A turn: its "role", its "content" and what else the template reads."""
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
"""The marks of transformers around what the assistant says."""
_PRIVATE = range(0xE000, 0xF8FF)
_MOST_SECONDS, _MOST_CHARACTERS, _MOST_BYTES = 20.0, 1 << 22, 1 << 30
"""What a template may take for one conversation, and make of it; of a large one more characters and memory."""
_TIMES_GIVEN, _BYTES_EACH = 8, 8
"""Characters for each that is given, and bytes of memory for each of those."""


class TemplateFault(DataError):
    """What a chat template does is wrong for every conversation."""

    code = "MDS402"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation in ids.

    Attributes:
        answers: of each id, whether the assistant's turns hold it: what a model is to learn.
    """

    ids: list[int]
    answers: list[bool]


class ChatTemplate:
    """A tokenizer's chat template, read once for many conversations.

    template: Jinja; that of the files beside the tokenizer where None. Raises DataError where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        found = template or tokenizer.companions.chat_template()
        if found is None:
            raise DataError(
                f"{tokenizer.path}: has no chat template; allowed: a model whose folder has chat_template.jinja, or "
                '"chat_template" in tokenizer_config.json; prepare-data also takes --chat-template FILE',
                code="MDS434",
            )
        try:
            import jinja2.sandbox

            from mythos_ds.data.template_limits import OverLimit, bound_transformers
            from mythos_hf.tokenization_mythos import ChatMarks
        except ImportError as error:
            raise DataError("chat templates need an extra: pip install 'mythos_ds[hf]'", code="MDS004") from error
        self.text, self.tokenizer, self._marks_of = found, tokenizer, ChatMarks
        bound_transformers()
        self._faults = (jinja2.TemplateSyntaxError, jinja2.sandbox.SecurityError, RecursionError, OverLimit)
        symbols = tokenizer.symbols()
        self._written = [symbol for symbol in symbols if symbol in found and not symbol.isspace()]
        self.tokens = tokenizer.special_tokens | {symbol: symbols[symbol] for symbol in self._written}
        """Ids of what the template may write as tokens, by name."""

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation, up to where the model is to answer. Raises DataError where the template refuses the
        messages, and where it decides by special tokens inside of them."""
        chat = _Chat(self, messages, tools, add_generation_prompt=add_generation_prompt)
        return [number for number, _, _ in chat.ids()]

    def encode_answers(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> EncodedChat:
        """Ids of a whole conversation, and which of them are the assistant's: what the template's own marks hold,
        `{% generation %}`; without such marks, of each of its turns what follows the prompt that it is asked with, up
        to the last special token in it. An id counts where any character of it does.

        Raises DataError as `encode` does, and where the template does not show where a turn begins or ends.
        """
        chat = _Chat(self, messages, tools, add_generation_prompt=False)
        spans = chat.answers()
        found = list(chat.ids())
        answers, place = [], 0
        for _, start, end in found:
            while place < len(spans) and spans[place][1] <= start:
                place += 1
            answers.append(place < len(spans) and spans[place][0] < end)
        return EncodedChat([number for number, _, _ in found], answers)

    def render(self, messages: Sequence[Any], *, template: str | None = None, **options: Any) -> str:
        """The text that the template, or another one, makes of messages, with the names of the tokenizer's special
        tokens. Raises DataError where the template refuses the messages, TemplateFault where it is none, reaches for
        what it may not, or takes more time, memory or characters than it may."""
        from transformers.utils.chat_template_utils import render_jinja_template

        from mythos_ds.data.template_limits import memory_limit, time_limit

        conversation = [[*map(dict, messages)]]
        most = _MOST_CHARACTERS + _TIMES_GIVEN * (len(str(conversation)) + len(str(options)))
        try:
            with memory_limit(_MOST_BYTES + _BYTES_EACH * (most - _MOST_CHARACTERS)), time_limit(_MOST_SECONDS):
                made: Any = render_jinja_template(
                    conversations=conversation, chat_template=template or self.text, **options, **self._named
                )
        except self._faults as error:
            raise self._fault(str(error)) from None
        except Exception as error:  # what a template does is its author's
            raise DataError(
                f"{self.tokenizer.path}: its chat template does not take these messages ({str(error)[:500]})",
                code="MDS435",
            ) from None
        text = str(made[0][0])
        if len(text) > most:
            raise self._fault(f"it made {len(text):,} characters of a conversation; allowed: {most:,}")
        return text

    def with_characters(self, start: str, end: str) -> str:
        """The template that writes these characters, too, at the start and end of what its marks of generation hold.
        White space is cut off beside its tags as before."""
        made = _GENERATION.sub(rf"{{%\1 generation %}}{{{{ '{start}' }}}}{{% set _mark = 0 \2%}}", self.text)
        return _END_GENERATION.sub(rf"{{%\1 set _mark = 0 %}}{{{{ '{end}' }}}}{{% endgeneration \2%}}", made)

    def _fault(self, what: str) -> TemplateFault:
        return TemplateFault(f"{self.tokenizer.path}: its chat template is at fault: {what[:500]}; mend it")

    @cached_property
    def _named(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        named = {
            kind: tokenizer.companions.named(kind) for kind in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        by_id = {number: token for token, number in tokenizer.special_tokens.items()}
        named["eos_token"] = named["eos_token"] or by_id.get(tokenizer.eos_id)
        named["bos_token"] = named["bos_token"] or tokenizer.begin_token()
        return {name: token for name, token in named.items() if token is not None}

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself what the assistant's is."""
        return _GENERATION.search(self.text) is not None

    def marks(self, messages: Sequence[Message], tools: Any) -> "ChatMarks":
        """Characters that tell what people wrote in a conversation from what the template writes."""
        return self._marks_of(self.tokenizer.special_tokens, messages, tools, self.text, symbols=self._written)


class _Chat:
    """One conversation, rendered with marks around the special tokens that people wrote."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ):
        self._template, self._marks = template, template.marks(messages, tools)
        marks, own = self._marks, list(messages)
        plain = template.render(own, tools=tools, add_generation_prompt=add_generation_prompt)
        self._tools = marks.mark(tools)
        for mark in (marks.mark, marks.mark_but_answers):
            self._messages = mark(own)
            self.rendered = self._render(self._messages, add_generation_prompt)
            if marks.plain(self.rendered) == plain and not marks.torn(self.rendered):
                break
        else:
            raise DataError(
                f"{template.tokenizer.path}: its chat template decides by special tokens inside of messages, where "
                f"they are text; allowed: messages without {', '.join(marks.special)}",
                code="MDS435",
            )

    def _render(self, messages: Any, add_generation_prompt: bool, template: str | None = None) -> str:
        options = {"tools": self._tools, "add_generation_prompt": add_generation_prompt}
        return self._template.render(messages, template=template, **options)

    def ids(self) -> Iterator[Span]:
        """Each id, with the place in the text without marks that it stands for."""
        marks, tokenizer, place = self._marks, self._template.tokenizer, 0
        for number, (is_token, run) in enumerate(marks.runs(self.rendered)):
            if is_token:
                yield self._template.tokens[run], place, place + len(run)
                place += len(run)
                continue
            for piece_number, piece in enumerate(marks.cut(run)):
                within = "within" if piece_number else "start" if number == 0 else "after"
                for identity, start, end in tokenizer.spans(piece, within):  # type: ignore[arg-type]
                    yield identity, place + start, place + end
                place += len(piece)

    def answers(self) -> list[tuple[int, int]]:
        """Where the assistant's turns lie in the text without marks, one after the other."""
        given = self._marked() if self._template.marks_answers else self._turns()
        found = [(start, end) for start, end in given if start < end]
        if not found:
            raise DataError(
                f"{self._template.tokenizer.path}: its chat template marks nothing as the assistant's", code="MDS435"
            )
        return [(self._plain_place(start), self._plain_place(end)) for start, end in found]

    def _plain_place(self, place: int) -> int:
        return len(self._marks.plain(self.rendered[:place]))

    def _marked(self) -> Iterator[tuple[int, int]]:
        """What the template's own marks hold, found by characters that they write: the library counts wrongly where the
        marks are in a macro, or in what a filter is applied to."""
        used = {*self.rendered, *self._template.text}
        start, end = islice((chr(number) for number in _PRIVATE if chr(number) not in used), 2)
        shown = self._render(self._messages, False, self._template.with_characters(start, end))
        texts, marks = (re.split(f"([{start}{end}])", shown)[first::2] for first in range(2))
        if "".join(texts) != self.rendered or marks != [start, end] * (len(marks) // 2):
            raise DataError(
                f"{self._template.tokenizer.path}: its chat template changes or cuts what its marks of generation hold "
                "after they were set; allowed: marks around what is written as it is",
                code="MDS435",
            )
        places = list(accumulate(map(len, texts)))
        yield from zip(places[::2], places[1::2], strict=False)

    def _turns(self) -> Iterator[tuple[int, int]]:
        """Turns, found by rendering the conversation up to each of them, without and with it.

        A template may leave a piece of a turn out once others follow it (the thoughts that led to it): its end is then
        the special token that ends it when it is the last.
        """
        shown, place = "", 0
        for number, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(self._messages[:number], True)
            said = self._render(self._messages[: number + 1], False)
            start = self._start(asked, shown, place)
            turn = said.removeprefix(asked)
            if start is None or turn == said:
                raise self._hidden(number, "begins")
            last = next(reversed(self._own_tokens(turn)), None)
            tail = turn[last.end() :] if last else ""
            if tail.strip():  # of a turn that no token ends, such as one before which its thoughts are marked
                last, tail = None, ""
            end = start + len(turn) - len(tail)
            if not self.rendered.startswith(turn, start):
                own = [] if last is None else [each for each in self._own_tokens(turn) if each[1] == last[1]]
                later = (each for each in self._own_tokens(self.rendered) if each.start() >= start)
                found = next((each for each in later if len(own) == 1 and each[1] == own[0][1]), None)
                if found is None or not self.rendered.startswith(tail, found.end()):
                    raise self._hidden(number, "ends")
                end = found.end()
                if not _without_a_piece(self.rendered[start:end], turn):
                    raise self._hidden(number, "ends")
            yield start, end
            shown, place = said, end + len(tail)

    def _start(self, asked: str, shown: str, place: int) -> int | None:
        """Where a turn begins in the whole, after `asked`; `shown` is what ended with the turn before, which ends at
        `place` in the whole."""
        if self.rendered.startswith(asked) and len(asked) >= place:
            return len(asked)
        between = asked.removeprefix(shown)
        known = bool(shown) and between != asked and self.rendered.startswith(between, place)
        return place + len(between) if known else None

    def _own_tokens(self, rendered: str) -> list[re.Match[str]]:
        """The special tokens, each in group 1, that are the template's own."""
        tokens = "|".join(map(re.escape, self._marks.special)) or "(?!)"
        quoted = f"{self._marks.start}(?:{tokens}){self._marks.end}"
        return [found for found in re.finditer(f"{quoted}|({tokens})", rendered) if found[1]]

    def _hidden(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self._template.tokenizer.path}: its chat template does not show where the assistant's turn {what} "
            f"(message {number}); allowed: a template with {{% generation %}} ... {{% endgeneration %}} around what "
            "the assistant says",
            code="MDS435",
        )


def _without_a_piece(shown: str, whole: str) -> bool:
    """Whether a text is another one of which a piece is left out, white space aside."""
    shown, whole = ("".join(text.split()) for text in (shown, whole))
    return len(shown) <= min(_alike(shown, whole) + _alike(shown[::-1], whole[::-1]), len(whole))


def _alike(text: str, other: str) -> int:
    """How many characters two texts begin with both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of one conversation in the model's chat template; see `ChatTemplate`, also for the errors."""
    chat = ChatTemplate(tokenizer, template)
    return chat.encode(messages, add_generation_prompt=add_generation_prompt, tools=tools)


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
