"""Losses by sequence and loop count are the model's own, and differences are taken on the same text."""

import json
import math
from pathlib import Path

import pytest
import torch

from mythos_ds.analysis import loop_losses
from mythos_ds.analysis.loop_losses import held_out_sequences, loss_table, paired, sequence_losses
from mythos_ds.config.loader import load_config
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.data.validation import held_out
from mythos_ds.errors import ConfigError
from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import load_model
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.text_data import make_dataset, make_texts

TINY = ROOT / "models" / "tiny"
evaluate = load_main("tools/evaluate.py")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Of a run whose text is made up, in the built-in model's tokenizer."""
    make_dataset(tmp_path / "text", Tokenizer.load(TINY), make_texts(60))
    data = {"datasets": [{"prefix": str(tmp_path / "text")}], "tokenizer": str(TINY / "tokenizer.model")}
    own = {**data, "data_dir": str(tmp_path), "split": [50, 50, 0]}
    return ["training.seq_len=32", *(f"data.{name}={json.dumps(value)}" for name, value in own.items())]


def test_a_sequence_has_the_loss_that_the_forward_gives(settings: list[str]) -> None:
    model = load_model(TINY)
    batches = held_out_sequences(load_config("tiny", settings).config, 5)
    assert sum(len(batch["tokens"]) for batch in batches) == 6, "whole batches"
    done: list[int] = []
    losses = sequence_losses(model, batches, [3, 1, 3], done.append)
    assert sum(done) == 6
    assert list(losses) == [1, 3]
    rows = [(batch["tokens"][i : i + 1], batch["targets"][i : i + 1], batch["positions"][i : i + 1])
            for batch in batches for i in range(2)]  # fmt: skip
    with torch.inference_mode():
        for loops, own in losses.items():
            whole = [float(model(t, n_loops=loops, targets=y, positions=p)) for t, y, p in rows]
            assert own == pytest.approx(whole, abs=1e-5)
    assert losses[1] != losses[3]


def test_the_seed_of_training_does_not_change_the_text(settings: list[str]) -> None:
    both = [held_out_sequences(load_config("tiny", [*settings, f"training.seed={n}"]).config, 4) for n in (0, 7)]
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(*both, strict=True))


def test_a_difference_is_that_of_the_same_sequences() -> None:
    """A common part, however large, does not count."""
    assert paired([3.0, 12.0, 7.0], [2.0, 10.0, 4.0]) == pytest.approx((2.0, math.sqrt(1 / 3)))
    rows = loss_table({2: [3.0, 12.0, 7.0], 1: [2.0, 10.0, 4.0]})
    assert rows[1:] == [["1", "5.3333", "", ""], ["2", "7.3333", "+2.0000", "0.5774"]]


def test_the_command_writes_what_it_measures(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "losses.json"
    given = ["tiny", "--config", "tiny", "--sequences", "4", "--json", str(file), *settings]
    assert run_tool(evaluate.parser(), evaluate.work, [*given, "--loops", "1", "2"]) == 0
    written = json.loads(file.read_text())
    assert [len(own) for own in written["sequences"].values()] == [4, 4]
    table = capsys.readouterr().out
    assert all(f"{loss:.4f}" in table for loss in written["loss"].values())


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--loops", "0"), "loops: given"), (("--sequences", "1"), "allowed: at least 2"), (("--config", "nope"), "nope")],
)
def test_bad_input_is_one_message(
    settings: list[str], options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(evaluate.parser(), evaluate.work, ["tiny", "--config", "tiny", *settings, *options]) == 2
    assert named in capsys.readouterr().err


def test_a_model_that_halts_is_refused(settings: list[str]) -> None:
    model = load_model(TINY)
    model.recurrent.halting = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="halting"):
        sequence_losses(model, [], [1])


def test_a_short_text_is_read_whole_unless_a_number_was_given(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = load_config("tiny", settings).config
    found = held_out(text.data, text.training, exact=True)
    assert found is not None
    length = found.tokens // 7
    config = load_config("tiny", [*settings, f"training.seq_len={length}"]).config
    said: list[str] = []
    monkeypatch.setattr(loop_losses._logger, "info", lambda text, *values: said.append(text % values))
    read = sum(len(batch["tokens"]) for batch in held_out_sequences(config))
    assert 2 <= read < 16
    assert len(said) == 1
    assert f" of {length}: {read} are read" in said[0]
    words = ["tiny", "--config", "tiny", *settings, f"training.seq_len={length}", "--sequences", "16"]
    assert run_tool(evaluate.parser(), evaluate.work, words) == 2
    assert "--sequences: given 16; the held-out text has " in capsys.readouterr().err
