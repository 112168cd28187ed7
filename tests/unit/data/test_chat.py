"""Which tokens of a conversation are the assistant's, against references that know nothing of how they are found."""

import datetime
import json
import random
import resource
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

from mythos_ds.data import chat as chat_module
from mythos_ds.data.chat import ChatTemplate, TemplateFault, encode_chat
from mythos_ds.data.chat_rows import conversation_of
from mythos_ds.data.rows import BadRow, Conversation
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DataError
from tests.helpers.chats import CHATML, ENDED_LAST, LLAMA, MARKED, THINKING, UNENDED, conversations, rows_of
from tests.helpers.tokenizers import byte_level_folder, sentencepiece_model

transformers = pytest.importorskip("transformers")

KINDS = ("json", "sentencepiece", "control")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """tokenizer.json; a sentencepiece model with the template's tokens as symbols; one with them beyond its pieces; one
    without."""
    folder = tmp_path_factory.mktemp("tokenizers")
    beyond = sentencepiece_model(folder / "control" / "tokenizer.model", "llama")
    size = Tokenizer.load(beyond).vocab_size
    tokens = {str(size + i): {"content": t, "special": True} for i, t in enumerate(("<|im_start|>", "<|im_end|>"))}
    (beyond.parent / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    return {
        "json": byte_level_folder(folder / "json", added=True),
        "sentencepiece": sentencepiece_model(folder / "sp" / "tokenizer.model", "chat symbols").parent,
        "control": beyond.parent,
        "plain": sentencepiece_model(folder / "plain" / "tokenizer.model", "bpe").parent,
    }


def spelt_out(own: Tokenizer, parts: Iterable[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids and flags of a conversation as (kind, text): a "token", the "end" of an answer, "text" of people, or what is
    "answered": the text before an answer, a null byte, the answer.

    Text between two tokens is encoded as one. Answers here begin where no token reaches over.
    """
    known, ids, flags = own.symbols() | own.special_tokens, list[int](), list[bool]()
    for kind, text in parts:
        if not text:
            continue
        if kind in ("token", "end"):
            ids.append(known[text])
            flags.append(kind == "end")
            continue
        asked, _, answer = text.partition("\0")
        found, before = (ids_of(own, each, known, first=not ids) for each in (asked + answer, asked))
        assert found[: len(before)] == before, "a token reaches into the answer"
        ids += found
        flags += [kind == "answered" and number >= len(before) for number in range(len(found))]
    return ids, flags


def ids_of(own: Tokenizer, text: str, known: dict[str, int], *, first: bool) -> list[int]:
    """Ids of people's text. A symbol of the template's that they wrote is text: it is cut after its first character."""
    symbols = [token for token in known if token.startswith("<|im") and token not in own.special_tokens]
    places = sorted(n + 1 for token in symbols for n in range(len(text)) if text.startswith(token, n))
    ids: list[int] = []
    for a, b in zip([0, *places], [*places, len(text)], strict=True):
        ids += own.encode_on(text[a:b]) if a else own.encode(text[a:b]) if first else own.encode_after(text[a:b])
    return ids


def chatml(chat):
    """CHATML, spelt out."""
    system = [] if chat[0]["role"] == "system" else [{"role": "system", "content": "Be brief."}]
    for number, message in enumerate([*system, *chat]):
        yield ("text", "" if number == 0 else "\n")
        yield ("token", "<|im_start|>")
        if message["role"] == "assistant":
            yield ("answered", f"assistant\n\0{message['content']}")
        else:
            yield ("text", f"{message['role']}\n{message['content']}")
        yield ("end" if message["role"] == "assistant" else "token", "<|im_end|>")
    yield ("text", "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_chatml_without_marks(places, kind):
    own = Tokenizer.load(places[kind])
    template = ChatTemplate(own, CHATML)
    for number, chat in enumerate(conversations()):
        row = conversation_of(rows_of(chat, number), "here")
        assert isinstance(row, Conversation), (row, chat)
        found = template.encode_answers(json.loads(row.text)["messages"])
        assert (found.ids, found.answers) == spelt_out(own, chatml(chat)), chat
        assert found.ids == encode_chat(own, chat, template=CHATML, add_generation_prompt=False)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_count_the_same_as_without_them(places, kind):
    """MARKED renders what CHATML does for conversations with a system message, and marks what is expected of that."""
    own = Tokenizer.load(places[kind])
    with_marks, without = ChatTemplate(own, MARKED), ChatTemplate(own, CHATML)
    for chat in conversations(seed=1):
        chat = chat if chat[0]["role"] == "system" else [{"role": "system", "content": "Be kind."}, *chat]
        assert with_marks.encode_answers(chat) == without.encode_answers(chat), chat


def test_marks_are_those_of_transformers(places):
    """The library's own mask, for conversations without special strings: it cannot take these as text."""
    own = Tokenizer.load(places["json"])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(own.path), eos_token="<|im_end|>")
    for number, chat in enumerate(conversations(seed=2, special=False)):
        for template in (MARKED, MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")):
            options = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
            theirs = plain.apply_chat_template(chat, **options)
            row = conversation_of(rows_of(chat, number), "here")
            assert isinstance(row, Conversation)
            found = ChatTemplate(own, template).encode_answers(json.loads(row.text)["messages"])
            assert (found.ids, list(map(int, found.answers))) == (theirs["input_ids"], theirs["assistant_masks"]), chat


IN_MACRO = (
    "{% macro said(m) %}assistant\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}<|im_start|>{% if m['role'] == 'assistant' %}{{ said(m) }}{% else %}"
    "{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
IN_SPACE = MARKED.replace("assistant\n{% generation %}", "assistant{{ '\n' }}\n  {%- generation -%}\n  ").replace(
    "{% endgeneration %}", "\n  {%- endgeneration +%}"
)


@pytest.mark.parametrize("template", [IN_MACRO, "{% set all %}" + MARKED + "{% endset %}{{ all }}", IN_SPACE])
def test_marks_are_found_wherever_they_stand(places, template):
    """In macros and in what a variable holds, where the library's own places are wrong; white space goes as before."""
    own = Tokenizer.load(places["json"])
    for chat in conversations(40, seed=7):
        assert ChatTemplate(own, template).encode_answers(chat) == ChatTemplate(own, MARKED).encode_answers(chat), chat
    cut = "{% filter upper %}" + MARKED + "{% endfilter %}"
    found = ChatTemplate(own, cut).encode_answers(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert own.decode([n for n, counts in zip(found.ids, found.answers, strict=True) if counts]).startswith("B")
    with pytest.raises(DataError, match="changes or cuts what its marks of generation hold"):
        ChatTemplate(own, "{% set all %}" + MARKED + "{% endset %}{{ all[:-2] }}").encode_answers(conversations(1)[0])


def llama(chat):
    """LLAMA, spelt out."""
    head = f"<<SYS>>\n{chat[0]['content']}\n<</SYS>>\n\n" if chat[0]["role"] == "system" else ""
    yield ("token", "<s>")
    spoken = [m for m in chat if m["role"] != "system"]
    for number in range(0, len(spoken), 2):
        asked, said = (m["content"].strip() for m in spoken[number : number + 2])
        yield ("answered", f"[INST] {'' if number else head}{asked} [/INST]\0 {said}")
        yield ("end", "</s>")


@pytest.mark.parametrize("kind", ["control", "plain"])
def test_a_llama_style(places, kind):
    own = Tokenizer.load(places[kind])
    for chat in conversations(seed=3):
        expected = spelt_out(own, llama(chat))
        found = ChatTemplate(own, LLAMA).encode_answers(chat)
        assert (found.ids, found.answers) == expected, chat


def thinking(chat):
    """THINKING, spelt out."""
    last = max(number for number, m in enumerate(chat) if m["role"] == "user")
    for number, message in enumerate(chat):
        content = message["content"]
        if message["role"] == "assistant" and number < last and "</think>" in content:
            content = content.split("</think>")[-1].lstrip("\n")
        yield ("text", "" if number == 0 else "\n")
        yield ("token", "<|im_start|>")
        answered = message["role"] == "assistant"
        yield ("answered" if answered else "text", f"{message['role']}\n" + ("\0" if answered else "") + content)
        yield ("end" if answered else "token", "<|im_end|>")
    yield ("text", "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_that_are_left_out_of_earlier_turns(places, kind):
    own = Tokenizer.load(places[kind])
    template, stripped = ChatTemplate(own, THINKING), 0
    for number, chat in enumerate(conversations(seed=4, think=True)):
        row = conversation_of(rows_of(chat, number), "here")
        assert isinstance(row, Conversation)
        found = template.encode_answers(json.loads(row.text)["messages"])
        assert (found.ids, found.answers) == spelt_out(own, thinking(chat)), chat
        stripped += "<think>" not in own.decode(found.ids) and any("<think>" in m["content"] for m in chat)
    assert stripped > 20, "some conversations had thoughts in earlier turns only"


def unended(chat):
    """UNENDED, spelt out."""
    for message in chat:
        yield ("token", "<|im_start|>")
        if message["role"] == "assistant":
            yield from (("text", "assistant\n"), ("end", "<|im_end|>"), ("answered", f"\0\n{message['content']}"))
        else:
            yield ("text", f"{message['role']}\n{message['content']}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_no_token_ends_counts_to_its_last_character(places, kind):
    own = Tokenizer.load(places[kind])
    for chat in conversations(seed=5):
        found = ChatTemplate(own, UNENDED).encode_answers(chat)
        ids, flags = spelt_out(own, unended(chat))
        assert found.ids == ids
        assert found.answers == flags, chat


def test_what_people_say_counts_in_no_template_that_ends_answers_differently(places):
    """The token that ends the last answer ends none before it: all up to it would be the first answer."""
    own = Tokenizer.load(places["json"])
    for chat in conversations(40, seed=6):
        answers = [m for m in chat if m["role"] == "assistant"]
        if len(answers) > 1:
            with pytest.raises(DataError, match="does not show where the assistant's turn ends"):
                ChatTemplate(own, ENDED_LAST).encode_answers(chat)
        else:
            found = ChatTemplate(own, ENDED_LAST).encode_answers(chat)
            learnt = [number for number, counts in zip(found.ids, found.answers, strict=True) if counts]
            assert own.decode(learnt[:-1]) == answers[0]["content"]
            assert learnt[-1] == own.special_tokens["</s>"]


FAULTS = {
    "{% for %}": "Expected an expression",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}": "come to an end in 0.3 s",
    "{% for m in messages %}{{ m.content }}{% endfor %}{% for a in range(999) %}{{ 'long' }}{% endfor %}": "characters",
    "{{ 9 ** (9 ** 9) }}": r"a number of [\d,]+ bits; allowed: 4,096",
    "{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}": "a number of .* bits",
    "{{ 5 | round(-1000000000) }}": "a number of .* bits",
    "{{ 0.5 | round(1000000000, 'ceil') }}": "a number of .* bits",
    "{{ [5] | map('round', -1000000000) | list }}": "a number of .* bits",
}


@pytest.mark.parametrize("template", FAULTS)
def test_a_template_that_is_at_fault_is_no_fault_of_the_messages(places, template, monkeypatch):
    monkeypatch.setattr(chat_module, "_MOST_SECONDS", 0.3)
    monkeypatch.setattr(chat_module, "_MOST_CHARACTERS", 200)
    own, started = Tokenizer.load(places["json"]), time.monotonic()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for encode in (ChatTemplate(own, template).encode_answers, ChatTemplate(own, template).encode):
        with pytest.raises(TemplateFault, match=FAULTS[template]):
            encode(chat)
    assert time.monotonic() - started < 60


TWICE = "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = "
LARGE = [
    "{{ 'a' * 3000000000 }}",
    "{{ [0] * 900000000 }}",
    TWICE + "n.x + n.x %}{% endfor %}",
    TWICE + "n.x ~ n.x %}{% endfor %}",
    TWICE + "[n.x, n.x] | join %}{% endfor %}",
    TWICE + "n.x.replace('a', 'aa') %}{% endfor %}",
    TWICE + "(n.x | replace('a', 'aa')) %}{% endfor %}",
    "{{ 'a' | center(3000000000) }}",
    "{{ 'a'.ljust(3000000000) }}",
    "{{ '1'.zfill(3000000000) }}",
    "{{ '\t'.expandtabs(2000000000) | length }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ '{:2000000000}'.format('a') }}",
    "{{ '{:2000000000}'.format_map({}) if false else '{x:2000000000}'.format_map({'x': 'a'}) }}",
    "{{ ['a', 'a'] | map('center', 2000000000) | join }}",
    "{{ 'a\na' | indent(2000000000) }}",
    "{{ [1, 2] | tojson(indent=2000000000) }}",
    "{{ [1] | batch(900000000, 0) | list }}",
    "{% set x = 'a' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}",
    "{% set x = 'a' * 1000000 %}{% macro f() %}{% for a in range(9999) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
    "{% set x = 'a' * 1000000 %}{% set y %}{% for a in range(9999) %}{{ x }}{% endfor %}{% endset %}",
]
"""Each makes gigabytes, of a result, of what it writes, or of what it keeps."""
SMALL = [
    "{{ [1] | slice(900000000) | list }}",
    "{% set n = namespace(x=[]) %}{% for a in range(9999) %}{% for b in range(9999) %}{% set n.x = [n.x, 1] %}"
    "{% endfor %}{% endfor %}",
]
"""The same, by small pieces, with which time may come to its end first."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say what a process has")
@pytest.mark.parametrize("template", [*LARGE, *(pytest.param(each, marks=pytest.mark.slow) for each in SMALL)])
def test_a_template_gets_so_much_memory_and_no_more(places, template, monkeypatch):
    nbytes = 1 << 27
    monkeypatch.setattr(chat_module, "_MOST_BYTES", nbytes)
    monkeypatch.setattr(chat_module, "_MOST_SECONDS", 2.0 if template in SMALL else 60.0)
    chat = ChatTemplate(Tokenizer.load(places["json"]), template)
    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    told = "0.125 GiB of memory|come to an end in 2 s" if template in SMALL else "more than 0.125 GiB of memory"
    with pytest.raises(TemplateFault, match=rf"json.*tokenizer.json: its chat template is at fault: .*({told})"):
        chat.encode([{"role": "user", "content": "a"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.1 * nbytes / 1024
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_large_conversation_may_become_a_large_text(places, monkeypatch):
    monkeypatch.setattr(chat_module, "_MOST_CHARACTERS", 100)
    own = Tokenizer.load(places["json"])
    assert len(ChatTemplate(own, CHATML).render([{"role": "user", "content": "a" * 1000}])) > 1000


def test_what_a_template_may_reckon(places):
    """Operators and rounding are those of Jinja where they are bounded."""
    own = Tokenizer.load(places["json"])
    given = "{{ 7 * 6 }} {{ '=' * 3 }} {{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 4 }} {{ '%s!' % 'a' }} "
    given += "{{ 2.567 | round(2) }} {{ 2.1 | round(method='ceil') }} {{ 2.0 ** 3 }}"
    assert ChatTemplate(own, given).render([]) == "42 === 1024 3 3.5 3 a! 2.57 3.0 8.0"


def test_templates_are_rendered_in_other_threads_too(places):
    own, found = Tokenizer.load(places["json"]), list[list[int]]()
    chat = [{"role": "user", "content": "a"}]
    thread = threading.Thread(target=lambda: found.append(encode_chat(own, chat, template=CHATML)))
    thread.start()
    thread.join()
    assert found == [encode_chat(own, chat, template=CHATML)]


def test_tool_calls_are_the_assistants(places):
    own = Tokenizer.load(places["json"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}CALL "
        "{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if tools %}{% endif %}"
    )
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    row = {
        "messages": [
            {"role": "user", "content": "Is it hot?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "30", "tool_call_id": "1"},
            {"role": "assistant", "content": "Yes"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
    }
    made = conversation_of(row, "here")
    assert isinstance(made, Conversation)
    content = json.loads(made.text)
    found = ChatTemplate(own, template).encode_answers(content["messages"], tools=content["tools"])
    answered = own.decode([number for number, counts in zip(found.ids, found.answers, strict=True) if counts])
    assert answered == "CALL weather RomeYes"


def test_templates_that_do_not_show_the_turns_are_refused(places):
    own = Tokenizer.load(places["json"])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    hidden = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match=r"does not show where the assistant's turn begins.*\{% generation %\}"):
        ChatTemplate(own, hidden).encode_answers(chat)
    shortened = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}{{ m.content[:0] }}{% endif %};{% endfor %}"
    )
    with pytest.raises(DataError, match="does not show where"):
        ChatTemplate(own, shortened).encode_answers(chat)
    nothing = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    empty = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    for template in (nothing, empty):
        with pytest.raises(DataError, match="marks nothing"):
            ChatTemplate(own, template).encode_answers(chat)
    with pytest.raises(DataError, match="--chat-template FILE"):
        ChatTemplate(Tokenizer.load(places["sentencepiece"]))


SAID = {"role": "assistant", "content": "b"}
ASKED = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        # Texts that are JSON of something else than messages.
        ({"prompt": "[3, 1, 2]", "response": "[1, 2, 3]"}, ["[3, 1, 2]", "[1, 2, 3]"]),
        ({"prompt": '[{"n": 1}]', "completion": '[{"n": 2}]'}, ['[{"n": 1}]', '[{"n": 2}]']),
        ({"prompt": [ASKED], "completion": "b"}, ["a", "b"]),
        ({"prompt": "a", "completion": [SAID]}, ["a", "b"]),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}, ["a", "b"]),
        ({"conversation": [ASKED, SAID]}, ["a", "b"]),
        # Values that only tables have.
        ({"messages": [{**ASKED, "at": datetime.date(2026, 1, 2), "raw": b"x"}, SAID]}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, "b"]}, SAID]}, ["ab", "b"]),
    ],
)
def test_rows_in_less_common_forms(row, messages):
    found = conversation_of(row, "here")
    assert isinstance(found, Conversation), found
    assert [message["content"] for message in json.loads(found.text)["messages"]] == messages


def test_tool_calls_may_be_json_text():
    calls = json.dumps([{"function": {"name": "f", "arguments": '{"x": [1]}'}}])
    found = conversation_of({"messages": [ASKED, {"role": "assistant", "tool_calls": calls}]}, "here")
    assert isinstance(found, Conversation)
    [call] = json.loads(found.text)["messages"][1]["tool_calls"]
    assert call == {"function": {"name": "f", "arguments": {"x": [1]}}}


def within(levels: int) -> Any:
    return [within(levels - 1)] if levels else "x"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": [], "value": "a"}]}, "unknown role; message 0: [] given"),
        ({"messages": [{"role": "user", "content": [{"type": [1]}]}]}, "a message holds more than text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}, SAID]},
            "a message holds more than text; message 0: 'image_url'",
        ),
        ({"messages": [{**ASKED, "more": within(150)}, SAID]}, "too deep; allowed: 100 levels"),
        ({"messages": [{**ASKED, "more": within(900)}, SAID]}, "too deep; allowed: 100 levels"),
        ({"messages": [{**ASKED, "more": 10**5000}, SAID]}, "a row that JSON cannot hold"),
        (["a"], "a row of named values is needed"),
        ({"text": "a"}, "no conversation of a known form; keys given: 'text'"),
        ({"prompt": "a"}, "no conversation of a known form"),
        ({"messages": []}, "messages is no list of messages"),
        ({"messages": "hello"}, "messages is no list of messages"),
        ({"messages": ["a"]}, "a message is no object"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last turn is not the assistant's; it is the user's"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role; message 0: 'bot' given; allowed: system"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "unknown role; message 0: 'robot' given; allowed: human",
        ),
        ({"instruction": "a", "output": " \n"}, "a turn of the assistant is empty; message 1"),
        ({"instruction": 1, "output": "b"}, "instruction or input is no text"),
        ({"prompt": "a", "completion": 3}, "a message has no text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "a message holds more than text"),
        ({"messages": [{"role": "assistant"}]}, "a message has no text"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "has a weight of its own"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": ["f"]}]},
            "tool_calls is no list of objects",
        ),
        ({"instruction": "a", "output": "b", "tools": "f"}, "tools is no list of objects"),
    ],
)
def test_rows_that_are_no_conversation(row, reason):
    found = conversation_of(row, "chats.jsonl line 3")
    assert isinstance(found, BadRow)
    assert reason in str(found)
    assert str(found).startswith("chats.jsonl line 3: ")


VALUES: list[Any] = [
    None,
    "",
    "a",
    "[]",
    "{}",
    '[{"role": "user"}]',
    0,
    1.5,
    True,
    [],
    {},
    [[]],
    {"type": [1]},
    b"x",
    ["a", {}],
]


def test_no_row_is_more_than_a_conversation_or_a_bad_row():
    """Any value in any place of a row."""
    generator, found = random.Random(0), set()

    def changed(value: Any) -> Any:
        if generator.random() < 0.15:
            return generator.choice(VALUES)
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list) else value

    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    for number, chat in enumerate(conversations(900, seed=8)):
        row = {**rows_of(chat, number), "tools": [{"type": "function"}], "system": "s"}
        if isinstance(row.get("messages"), list):
            row["messages"] = [{**message, "tool_calls": calls} for message in row["messages"]]
        made = conversation_of(changed(row), "here")
        assert isinstance(made, Conversation | BadRow)
        found.add(type(made))
        if isinstance(made, Conversation):
            messages = json.loads(made.text)["messages"]
            assert all(isinstance(message["content"], str) for message in messages)
            assert messages[-1]["role"] == "assistant"
    assert found == {Conversation, BadRow}
