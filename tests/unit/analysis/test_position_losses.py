"""Losses by position are those of the model's own forward on whole documents that are held out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from mythos_ds.analysis.position_losses import long_documents, position_losses, position_parts, position_table
from mythos_ds.config.loader import load_config
from mythos_ds.config.schema import RunConfig
from mythos_ds.data.inspection import DatasetView
from mythos_ds.data.tokenizer import Tokenizer, train_tokenizer
from mythos_ds.errors import ConfigError, DataError
from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import load_model
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.text_data import make_dataset, make_texts

TINY = ROOT / "models" / "tiny"
LENGTH = 32
evaluate = load_main("tools/evaluate.py")


def _settings(folder: Path, **data: object) -> list[str]:
    own = {"datasets": [{"prefix": str(folder / "text")}], "tokenizer": str(TINY / "tokenizer.model"), **data}
    settings = {"data_dir": str(folder), "split": [50, 50, 0], **own}
    return ["training.seq_len=16", *(f"data.{name}={json.dumps(value)}" for name, value in settings.items())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Made-up text, of which every second document is long."""
    texts = [text * (6 if number % 2 else 1) for number, text in enumerate(make_texts(40))]
    make_dataset(tmp_path / "text", Tokenizer.load(TINY), texts)
    make_dataset(tmp_path / "own", Tokenizer.load(TINY), [text * 8 for text in make_texts(6)])
    return tmp_path


def _config(folder: Path, **data: object) -> RunConfig:
    return load_config("tiny", _settings(folder, **data)).config


def test_documents_are_held_out_long_enough_and_whole_from_their_start(folder: Path) -> None:
    batches = long_documents(_config(folder), LENGTH, 4)
    view = DatasetView(folder / "text")
    allowed = [view.document(n).tolist() for n in range(20, 40) if view.lengths[n] > LENGTH]
    starts = [document[: LENGTH + 1] for document in allowed]
    found = [[*batch["tokens"][0].tolist(), int(batch["targets"][0, -1])] for batch in batches]
    assert all(document in starts for document in found)
    assert len({tuple(document) for document in found}) == 4
    for batch in batches:
        assert batch["positions"].tolist() == [list(range(LENGTH))]
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_text_of_its_own_is_held_out_whole(folder: Path) -> None:
    config = _config(folder, validation=str(folder / "own"))
    assert len(long_documents(config, LENGTH, 6)) == 6
    with pytest.raises(ConfigError, match="has 6 documents"):
        long_documents(config, LENGTH, 7)


def test_data_of_another_tokenizer_or_with_other_ids_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.model"
    train_tokenizer(make_texts(200), other, vocab_size=300)
    with pytest.raises(DataError, match="another tokenizer"):
        long_documents(_config(folder, tokenizer=str(other)), LENGTH, 3)
    # Of a large file only samples are compared when it is opened.
    monkeypatch.setattr(DatasetView, "document", lambda view, number: np.full(view.lengths[number], 65535, np.uint16))
    with pytest.raises(DataError, match=r"document \d+ holds ids outside of 0 .. 4095"):
        long_documents(_config(folder), LENGTH, 3)


def test_a_part_has_the_mean_loss_of_its_tokens(folder: Path) -> None:
    model = load_model(TINY)
    batches = long_documents(_config(folder), LENGTH, 3)
    found = position_losses(model, batches, [1, 2])
    assert position_parts(LENGTH) == [(0, 4), (4, 8), (8, 16), (16, 32)]
    for loops, documents in found.items():
        for batch, own in zip(batches, documents, strict=True):
            with torch.inference_mode():
                logits = model(batch["tokens"], n_loops=loops, positions=batch["positions"])
            losses = functional.cross_entropy(logits[0], batch["targets"][0], reduction="none")
            expected = [float(losses[start:end].mean()) for start, end in ((0, 4), (4, 8), (8, 16), (16, 32))]
            assert own == pytest.approx(expected, abs=1e-5)


def test_the_table_compares_with_the_second_part() -> None:
    rows = position_table({2: [[9.0, 2.0, 3.0, 4.0], [8.0, 4.0, 5.0, 8.0]]}, LENGTH)
    assert rows[0] == ["positions", "2 loops", "less the second part"]
    assert rows[2] == ["4 - 7", "3.0000", ""]
    assert rows[4] == ["16 - 31", "6.0000", "+3.0000 ± 1.0000"]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "positions.json"
    words = ["tiny", "--config", "tiny", "--by-position", str(LENGTH), "--sequences", "3", "--json", str(file)]
    assert run_tool(evaluate.parser(), evaluate.work, [*words, *_settings(folder)]) == 0
    assert "| 16 - 31 |" in capsys.readouterr().out
    assert [len(own) for own in json.loads(file.read_text())["documents"].values()] == [3]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--by-position", "8"), "allowed: 16 to"),
        (("--by-position", "100000"), "has 0 documents of more than 100000 tokens"),
        (("--by-position", "32", "--sequences", "1"), "allowed: 2 to"),
        (("--by-position", "32", 'data.validation="none"'), "no held-out text"),
        (("--by-position", "32", "model.vocab_size=100"), "allowed: at least"),
    ],
)
def test_bad_input_is_one_message(
    folder: Path, options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(evaluate.parser(), evaluate.work, ["tiny", "--config", "tiny", *_settings(folder), *options]) == 2
    assert named in capsys.readouterr().err
