"""The tokenizer of the exported model: raw text is text, a chat template's own special tokens are tokens."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerFast

_PRIVATE = range(0xE000, 0xF8FF)
_POSITIONAL = ("tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")
"""Parameters of `apply_chat_template` after the conversation."""
_NO_PREFIX = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
"""Fields of a sentencepiece model, add_dummy_prefix and remove_extra_whitespaces: off. Later ones count."""
_FIRST = '"prepend_scheme":"first"'


class ChatMarks:
    """Two characters that no string of a conversation has, put around the special tokens that are text in it.

    A rendered template is cut at its own special tokens; those that people wrote stay in the text between.
    """

    def __init__(self, special: Iterable[str], *given: Any, symbols: Iterable[str] = ()):
        """special: the tokenizer's special tokens. symbols: other tokens that the template writes, and that the
        tokenizer finds in every text."""
        self.symbols = sorted(symbols, key=len, reverse=True)
        self.special = sorted({token for token in [*special, *self.symbols] if token}, key=len, reverse=True)
        used = set("".join([*_strings(given), *self.special]))
        free = (chr(number) for number in _PRIVATE if chr(number) not in used)
        self.start, self.end = next(free), next(free)
        self._tokens = "|".join(map(re.escape, self.special)) or "(?!)"
        self._reserved = "|".join(re.escape(each) for each in self.special if each not in self.symbols) or "(?!)"
        self._marked = self._tokens
        self.marked = False

    def mark(self, given: Any) -> Any:
        """The same strings, lists and dictionaries, with special tokens between marks."""
        if isinstance(given, str):
            marked = re.sub(self._marked, lambda found: f"{self.start}{found[0]}{self.end}", given)
            self.marked = self.marked or marked != given
            return marked
        if isinstance(given, dict):
            return {key: self.mark(value) for key, value in given.items()}
        if isinstance(given, (list, tuple)):
            return [self.mark(value) for value in given]
        return given

    def mark_but_answers(self, messages: Any) -> Any:
        """As `mark`, but symbols in the messages of the role assistant are what the model wrote, such as `<think>`: for
        templates that look for them there."""
        if isinstance(messages, (list, tuple)):
            return [self.mark_but_answers(each) for each in messages]
        answer = isinstance(messages, dict) and messages.get("role") == "assistant"
        self._marked = self._reserved if answer else self._tokens
        made = self.mark(messages)
        self._marked = self._tokens
        return made

    def torn(self, rendered: str) -> bool:
        """Whether a template cut a message between a special token and its second mark: the token would count as the
        template's own."""
        tokens = "|".join(re.escape(token) for token in self.special if token not in self.symbols) or "(?!)"
        return not all(found[1] for found in re.finditer(f"{self.start}(?:{tokens})({self.end}?)", rendered))

    def plain(self, text: str) -> str:
        """`text` without marks."""
        return text.replace(self.start, "").replace(self.end, "")

    def cut(self, text: str) -> list[str]:
        """`text` in pieces that hold no symbol whole: what a run has of them was written by people."""
        whole = "|".join(map(re.escape, self.symbols)) or "(?!)"
        places = [found.start() + 1 for found in re.finditer(f"(?=({whole}))", text)]
        return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]

    def runs(self, rendered: str) -> Iterator[tuple[bool, str]]:
        """The pieces of a rendered template: whether each is a special token, and its text without marks."""
        quoted = f"{self.start}(?:{self._tokens}){self.end}"
        text = ""
        for piece in re.split(f"({quoted}|{self._tokens})", rendered):
            if piece in self.special:
                if text:
                    yield False, text
                yield True, piece
                text = ""
            else:
                text += self.plain(piece)
        if text:
            yield False, text


class RenderedChat(str):
    """A rendered chat template that remembers which of its special tokens people wrote."""

    marked: str
    marks: ChatMarks

    def __new__(cls, text: str, marked: str = "", marks: ChatMarks | None = None) -> "RenderedChat":
        made = super().__new__(cls, text)
        made.marked, made.marks = marked, marks or ChatMarks(())
        return made


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict):
        for key, value in given.items():
            yield from _strings([key, value])
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from _strings(value)


def without_prefix(pieces: Any) -> Any:
    """The sentencepiece model for text that goes on: no space is put before it, and none is taken away."""
    import sentencepiece

    made = sentencepiece.SentencePieceProcessor()
    made.LoadFromSerializedProto(pieces.serialized_model_proto() + _NO_PREFIX)
    return made


def going_on(backend: Tokenizer) -> Tokenizer:
    """The tokenizer for text after a special token: it puts no space before where only a text's start has one."""
    content = json.dumps(json.loads(backend.to_str()), separators=(",", ":"))
    return Tokenizer.from_str(content.replace(_FIRST, '"prepend_scheme":"never"'))


class _TextIsText(PreTrainedTokenizerFast):
    """How text becomes ids. It has no vocabulary of its own: transformers rebuilds those of classes with `__init__`."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._loaded = False
        self._exact = kwargs.get("ids_by") == "sentencepiece"
        self._after: Tokenizer | None = None
        self._pieces: Any = None
        self._going_on: Any = None
        kwargs["split_special_tokens"] = True
        super().__init__(*args, **kwargs)
        self._own = set(self._special()) - set(self._added_later())
        self._loaded = True

    @classmethod
    def convert_to_native_format(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the tokenizer is made of. Special tokens of which tokenizer.json says nothing get their names here."""
        for name, token in (kwargs.pop("own_special_tokens", None) or {}).items():
            kwargs.setdefault(name, token)
        return super().convert_to_native_format(*args, **kwargs)

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        """Special tokens that are added to a loaded tokenizer are found in every text, unlike its own."""
        if self._loaded and special_tokens:
            later = [str(token) for token in new_tokens if str(token) not in self._own]
            known = self.init_kwargs.get("added_later") or []
            self.init_kwargs["added_later"] = [*known, *(token for token in later if token not in known)]
        return super()._add_tokens(new_tokens, special_tokens)

    def _backend(self) -> Tokenizer:
        assert isinstance(self._tokenizer, Tokenizer)
        return self._tokenizer

    def _added_later(self) -> list[str]:
        return list(self.init_kwargs.get("added_later") or [])

    def _special(self) -> list[str]:
        added = [token.content for token in self._backend().get_added_tokens_decoder().values() if token.special]
        return [*dict.fromkeys([*added, *map(str, self.all_special_tokens)])]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; special tokens that the messages, tools and documents hold are text, also in what is
        rendered with `tokenize=False` and given to the tokenizer then."""
        kwargs |= dict(zip(_POSITIONAL, args, strict=False))
        kwargs.pop("sanitize_control_tokens", None)  # always
        conversation = _plain_messages(conversation)
        beside = {name: kwargs.pop(name) for name in ("tools", "documents") if kwargs.get(name) is not None}
        if "tools" in beside:
            beside["tools"] = [tool if isinstance(tool, dict) else _schema(tool) for tool in beside["tools"]]
        template = self.get_chat_template(kwargs.get("chat_template"), beside.get("tools"))
        added = self._backend().get_added_tokens_decoder().values()
        symbols = [token.content for token in added if not token.special and not token.content.isspace()]
        written = [symbol for symbol in symbols if symbol in template]
        marks = ChatMarks(self._special(), conversation, beside, template, symbols=written)
        marked, marked_beside = marks.mark(conversation), marks.mark(beside)
        tokenize = kwargs.pop("tokenize", True)
        if marks.marked or not tokenize:
            given = {**kwargs, "tokenize": False}
            plain = super().apply_chat_template(conversation, **beside, **given)
            for tried in (marked, marks.mark_but_answers(conversation)):
                marked, rendered = tried, super().apply_chat_template(tried, **marked_beside, **given)
                found = _listed(rendered)
                kept = [marks.plain(text) for text in found] == _listed(plain) and not any(map(marks.torn, found))
                if kept:
                    break
            if not kept:
                raise ValueError("the chat template decides by special tokens inside of messages, where they are text")
            if not tokenize:
                made = [RenderedChat(marks.plain(text), text, marks) for text in _listed(rendered)]
                return made[0] if isinstance(rendered, str) else made
        if kwargs.get("return_assistant_tokens_mask") and self._needs_runs([], marks):
            raise ValueError("return_assistant_tokens_mask: not where special tokens are text, or sentencepiece cuts")
        options = {**(kwargs.pop("tokenizer_kwargs", None) or {}), "chat_marks": marks}
        return super().apply_chat_template(marked, tokenizer_kwargs=options, **marked_beside, **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The pieces of a text."""
        if pair is None and not kwargs and self._needs_runs([text], None):
            return list(self.convert_ids_to_tokens(self._ids(text, None, add_special_tokens)))
        return super().tokenize(text, pair, add_special_tokens, **kwargs)

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        marks = kwargs.pop("chat_marks", None)
        batched = isinstance(text, (list, tuple))
        texts = list(text) if batched else [text]
        if marks is None and texts and all(isinstance(each, RenderedChat) for each in texts):
            marks = _common([each.marks for each in texts])
            texts = [each.marked for each in texts]
            text = texts if batched else texts[0]
        text, texts, text_pair = _well_formed(text), _well_formed(texts), _well_formed(text_pair)
        as_text = marks is not None or kwargs.get("split_special_tokens") is not False
        simple = text_pair is None and not kwargs.get("is_split_into_words") and all(isinstance(t, str) for t in texts)
        wanted = ("return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask")
        offsets = [name for name in wanted if kwargs.get(name)]
        if not (simple and as_text and self._needs_runs(texts, marks)):
            kwargs["split_special_tokens"] = as_text and marks is None
            return super()._encode_plus(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)
        if offsets and not (marks is not None and marks.marked) and not self._found_later(texts):
            kwargs["split_special_tokens"] = marks is None
            return super()._encode_plus(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)
        if offsets:
            raise ValueError(f"{offsets[0]}: not for text with special tokens both as tokens and as text")
        made = [self._ids(each, marks, add_special_tokens) for each in texts]
        return self._batch(made, batched, kwargs)

    def _batch(self, made: list[list[int]], batched: bool, options: dict[str, Any]) -> BatchEncoding:
        """Ids cut and padded as asked for."""
        longest = options.get("max_length")
        cut = getattr(options.get("truncation_strategy"), "value", "do_not_truncate") != "do_not_truncate"
        if cut and longest is not None:
            made = [ids[:longest] if self.truncation_side == "right" else ids[-longest:] for ids in made]
        types = options.get("return_token_type_ids")
        tensors = options.get("return_tensors")
        content: dict[str, Any] = {"input_ids": made}
        if types:
            content["token_type_ids"] = [[0] * len(ids) for ids in made]
        if not (batched or tensors):
            content = {name: values[0] for name, values in content.items()}
        padded = self.pad(
            content,
            padding=options.get("padding_strategy", False),
            max_length=longest,
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=options.get("padding_side"),
            return_attention_mask=options.get("return_attention_mask"),
            return_tensors=tensors,
        )
        return padded if isinstance(padded, BatchEncoding) else BatchEncoding(padded, tensor_type=tensors)

    def _needs_runs(self, texts: list[str], marks: ChatMarks | None) -> bool:
        """Whether the library alone would give other ids: it cannot take some special tokens as text, others not."""
        if self._exact and self._sentencepiece() is not None:
            return True
        return marks.marked if marks is not None else self._found_later(texts)

    def _found_later(self, texts: list[str]) -> bool:
        return any(token in text for token in self._added_later() for text in texts)

    def _ids(self, text: str, marks: ChatMarks | None, add_special_tokens: bool) -> list[int]:
        """Ids of a text, or of a rendered template, cut at the special tokens that are tokens in it."""
        cut = marks or ChatMarks(self._added_later(), text)
        ids: list[int] = []
        for number, (is_token, run) in enumerate(cut.runs(text)):
            if is_token:
                ids.append(cast(int, self._backend().token_to_id(run)))
                continue
            for place, piece in enumerate(cut.cut(run)):
                ids += self._text_ids(piece, first=number == place == 0, within=place > 0)
        if not add_special_tokens or self._backend().num_special_tokens_to_add(False) == 0:
            return ids
        return list(self.build_inputs_with_special_tokens(ids))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """What the tokenizer puts around a text, such as the token of its begin, around ids."""
        around = self._backend().encode("a", add_special_tokens=True)
        places = [place for place, special in enumerate(around.special_tokens_mask) if not special]
        before, after = around.ids[: places[0]], around.ids[places[-1] + 1 :]
        return [*before, *token_ids_0, *(token_ids_1 or []), *after]

    def _text_ids(self, text: str, *, first: bool, within: bool) -> list[int]:
        """Ids of text without any special token."""
        pieces = self._sentencepiece() if self._exact or within else None
        if pieces is not None:
            if within and self._going_on is None:
                self._going_on = without_prefix(pieces)
            pieces = self._going_on if within else pieces
            return list(pieces.EncodeAsIds(_well_formed(text)))
        if not first and self._after is None:
            self._after = going_on(self._backend())
        backend = self._backend() if first or self._after is None else self._after
        backend.encode_special_tokens = True
        backend.no_truncation()  # which a file may ask for, as its maker's last call left it
        backend.no_padding()
        return list(backend.encode(_well_formed(text), add_special_tokens=False).ids)

    def _sentencepiece(self) -> Any:
        """The model that the text was trained with; None where the library is not installed."""
        if self._pieces is None:
            try:
                import sentencepiece

                self._pieces = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
            except (ImportError, OSError, TypeError, AttributeError):
                self._pieces = False
        return self._pieces or None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": None, "_going_on": None, "_after": None}


class MythosTokenizer(_TextIsText):
    """tokenizer.json, whose own special tokens are text in raw text and in the messages of a chat.

    Special tokens that are added to it later stay whole everywhere but in messages. Where the ids of a sentencepiece
    model are not those of the library (`ids_by` in tokenizer_config.json), sentencepiece itself makes them.
    """


def _well_formed(given: Any) -> Any:
    """Strings, in lists too, with U+FFFD for lone surrogates, which no UTF-8 text can hold; others as they are."""
    if type(given) in (list, tuple):
        return type(given)(map(_well_formed, given))
    if not isinstance(given, str) or not re.search("[\ud800-\udfff]", given):
        return given
    return given.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain_messages(conversation: Any) -> Any:
    """A conversation, or several, as lists."""
    if hasattr(conversation, "messages"):
        conversation = conversation.messages
    if isinstance(conversation, (list, tuple)):
        return [_plain_messages(each) if not isinstance(each, dict) else each for each in conversation]
    return conversation


def _common(marks: list[ChatMarks]) -> ChatMarks:
    """The marks of chats that were rendered one by one. Raises ValueError where they are not the same characters."""
    if len({(each.start, each.end) for each in marks}) > 1:
        raise ValueError("chats that hold characters of the private use area: tokenise them one by one")
    return next((each for each in marks if each.marked), marks[0])


def _listed(rendered: Any) -> list[str]:
    return [rendered] if isinstance(rendered, str) else list(rendered)


def _schema(tool: Any) -> Any:
    from transformers.utils import get_json_schema

    return get_json_schema(tool)
