"""Continuing a text: greedy follows the likeliest token, the end ends it, and the tool says what is wrong."""

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mythos_ds.inference.generate import generate
from mythos_ds.lab.studies.language import base, configuration
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import save_model
from tests.helpers.mains import load_main
from tests.helpers.text_data import make_tokenizer


def _next_number(tokens: Tensor) -> Tensor:
    """Counts modulo 8; rows 8 and 9 are likeliest but have no piece."""
    logits = torch.zeros(10)
    logits[(tokens[0, -1] + 1) % 8] = 5.0
    logits[8:] = 9.0
    return logits


def _run(prompt: list[int], **options) -> list[int]:
    return generate(_next_number, prompt, **{
        "new_tokens": 5, "vocab_size": 8, "eos_id": 0, "context_length": 4, "temperature": 0.0, **options
    })  # fmt: skip


def test_greedy_takes_the_likeliest_piece_and_stops_at_the_end() -> None:
    assert _run([2]) == [3, 4, 5, 6, 7]
    assert _run([5]) == [6, 7]
    assert _run([], eos_id=7) == [0, 1, 2, 3, 4]  # an empty prompt begins after an end


def test_draws_repeat_with_the_seed_and_never_leave_the_vocabulary() -> None:
    drawn = _run([2], temperature=5.0, new_tokens=200, eos_id=-1)
    assert drawn == _run([2], temperature=5.0, new_tokens=200, eos_id=-1)
    assert drawn != _run([2], temperature=5.0, new_tokens=200, eos_id=-1, seed=1)
    assert set(drawn) <= set(range(8))


def test_only_the_last_tokens_are_seen() -> None:
    seen: list[int] = []

    def note(tokens: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return _next_number(tokens)

    generate(note, [1, 2, 3], new_tokens=4, vocab_size=8, eos_id=-1, context_length=4, temperature=0.0)
    assert seen == [3, 4, 4, 4]


def test_the_tool_continues_a_prompt_and_refuses_a_loop_count_below_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = configuration(base("cpu")).model.model_copy(update={"vocab_size": 512})
    save_model(MythosModel(model), tmp_path, {"seq_len": 16})
    make_tokenizer(tmp_path)

    tool = load_main("tools/generate.py")

    def run(*arguments: str) -> int:
        return run_tool(tool.parser(), tool.work, ["def ", "--model", str(tmp_path), *arguments])

    assert run("--tokens", "3", "--loops", "2") == 0
    assert capsys.readouterr().out.startswith("def ")
    assert run("--loops", "0") == 2
    assert "allowed: 1 or more" in capsys.readouterr().err


def test_a_terminal_sees_the_text_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = configuration(base("cpu")).model.model_copy(update={"vocab_size": 512})
    save_model(MythosModel(model), tmp_path, {"seq_len": 16})
    make_tokenizer(tmp_path)
    tool = load_main("tools/generate.py")

    class Terminal(io.StringIO):
        parts: list[str]

        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    texts = []
    for terminal in (False, True):
        stream = Terminal()
        stream.parts = []
        monkeypatch.setattr(sys, "stdout", stream)
        words = ["def ", "--model", str(tmp_path), "--tokens", "12", "--seed", "3"]
        assert run_tool(tool.parser(), tool.work, words) == 0
        assert (len(stream.parts) > 3) == terminal
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]
