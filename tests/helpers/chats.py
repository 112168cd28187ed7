"""Chat templates of several kinds, conversations in every form of a row, and what of them the assistant wrote, found
without the code that is tested."""

import json
import random
from typing import Any

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As SmolLM2's: no marks of generation."""
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""With the marks of transformers."""
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\\n' + messages[0]['content'] + "
    "'\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ head if loop.first else '' }}{{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
"""As Llama 2's: turns told by text, the answer ends with the end of document, no generation prompt."""
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'] %}"
    "{% if '</think>' in said and loop.index0 < ns.last %}{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}<|im_start|>assistant\n{{ said }}<|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen 3's: thoughts of turns before the last question are left out, those of the turns after it stay."""

UNENDED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<|im_end|>\n{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As GLM 4.5's: an answer begins with a token (there that of its thoughts' end), and none ends it."""
ENDED_LAST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}</s>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As gpt-oss's: the last answer ends with another token than those before it."""

_WORDS = [
    "hello", "world", " x=1;", "naïve", "漢字", "\U0001f642", "\n", "  ", "(1)", "{{ 1 }}", "<|im_end|>",
    "<|im_start|>", "<|im_end|>\n<|im_start|>assistant\nno", "</s>", "<tool>", "[INST]", "[/INST]", "assistant\n",
]  # fmt: skip


def conversations(
    count: int = 200, *, seed: int = 0, think: bool = False, special: bool = True
) -> list[list[dict[str, str]]]:
    """Conversations of one to four answers, whose people write special strings, unless `special` is False. think:
    answers begin with thoughts, and some follow a tool's result."""
    generator = random.Random(seed)
    words = _WORDS if special else [word for word in _WORDS if "<" not in word]

    def text() -> str:
        inner = "".join(generator.choices(words, k=generator.randint(1, 6)))
        return f"{generator.choice('abc')}{inner}{generator.choice('xyz')}"

    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if generator.random() < 0.4 else []
        for _ in range(generator.randint(1, 4)):
            chat.append({"role": "user", "content": text()})
            thought = f"<think>{text()}</think>\n\n" if think and generator.random() < 0.7 else ""
            chat.append({"role": "assistant", "content": thought + text()})
            if think and generator.random() < 0.3:
                chat += [{"role": "tool", "content": text()}, {"role": "assistant", "content": thought + text()}]
        made.append(chat)
    return made


def rows_of(chat: list[dict[str, str]], number: int) -> dict[str, Any]:
    """One of the forms that hold this conversation, by `number`."""
    system = next((m["content"] for m in chat if m["role"] == "system"), None)
    spoken = [m for m in chat if m["role"] != "system"]
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    forms: list[dict[str, Any]] = [
        {"messages": chat, "id": number, "source": None},
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]},
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in spoken], "system": system},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat], "tools": []},
        {"messages": json.dumps(chat), "tools": None},
        {"prompt": chat[:-1], "completion": chat[-1:]},
    ]
    if len(spoken) == 2:
        asked, said = (m["content"] for m in spoken)
        forms += [
            {"instruction": asked, "input": "", "output": said, "system": system},
            {"prompt": asked, "completion": said, "system": system},
            {"prompt": asked, "response": said, "system": system, "score": 1},
        ]
    return forms[number % len(forms)]
