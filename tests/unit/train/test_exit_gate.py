"""A gate learns on a frozen model, and exit rules are compared at equal mean depth."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from mythos_ds.analysis.exit_rule_comparison import (
    CLASSES,
    ORACLE,
    draw,
    exits_by_score,
    measure,
    oracle_exits,
    token_classes,
)
from mythos_ds.config.loader import load_config
from mythos_ds.data.held_out import open_text
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import ConfigError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.train.exit_gate import explained_share, train_exit_gate, with_exit_gate
from mythos_ds.weights.model_folder import load_model, read_metadata, save_model
from tests.helpers.mains import load_main
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer
from tests.helpers.toy_model import randomise, toy_batch, toy_config

LOOPS = 5


@pytest.fixture(scope="module")
def plain() -> tuple[MythosModel, dict[str, Tensor]]:
    """A model and the batch that the gate learns by heart."""
    config = toy_config(recurrent_layers=1, mean_recurrence=4)
    return randomise(MythosModel(config)).eval(), toy_batch(config)


@pytest.fixture(scope="module")
def gated(plain: tuple[MythosModel, dict[str, Tensor]]) -> MythosModel:
    model = with_exit_gate(plain[0])
    train_exit_gate(model, [plain[1]] * 150, steps=150, n_loops=LOOPS, lr=1e-2)
    return model


def test_nothing_but_the_gate_is_trained(plain: tuple[MythosModel, dict[str, Tensor]], gated: MythosModel) -> None:
    model, batch = plain
    own = gated.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(own.pop(name), value), name
    fresh = with_exit_gate(model).state_dict()
    assert own
    for name, value in own.items():
        assert name.startswith("recurrent.gate."), name
        assert not torch.equal(value, fresh[name]), f"{name} has not moved"
    assert torch.equal(gated(**batch, n_loops=LOOPS), model(**batch, n_loops=LOOPS))
    with pytest.raises(ConfigError, match="halting"):
        with_exit_gate(gated)


def test_the_gate_beats_chance_and_nothing_beats_the_oracle(
    plain: tuple[MythosModel, dict[str, Tensor]], gated: MythosModel, tmp_path: Path
) -> None:
    batch = {**plain[1], "classes": plain[1]["tokens"] % len(CLASSES)}
    assert explained_share(gated, [batch], LOOPS) > 0.8
    results = json.loads(json.dumps(measure(gated, [batch, batch], LOOPS, depths=(2.5, 9))))
    assert results["depths"] == [1, 2, 2.5, 3, 4, 5]
    rules = results["rules"]
    at = results["depths"].index(2.5)
    assert rules["gate"]["loss"][at] < rules["random"]["loss"][at]
    assert rules["gate"]["loss"][at] < rules["fixed"]["loss"][at]
    for name, rule in rules.items():
        for least, loss in zip(rules[ORACLE]["loss"], rule["loss"], strict=True):
            assert loss is None or least <= loss + 1e-9, name
        for shares in rule.get("exit_shares", {}).get("2.5", {}).values():
            assert sum(shares) == pytest.approx(1, abs=1e-5)
    mean = sum((loop + 1) * share for loop, share in enumerate(rules["gate"]["exit_shares"]["2.5"]["all"]))
    assert mean == pytest.approx(2.5, abs=1e-5)
    assert set(rules["gate"]["exit_shares"]["2.5"]) == {"all", *CLASSES}
    assert rules["kl"]["loss"][0] is None, "there is no divergence after the first loop"
    assert rules["random"]["loss"][-1] == pytest.approx(rules["fixed"]["loss"][-1])
    draw(results, tmp_path / "halting.png")
    assert (tmp_path / "halting.png").read_bytes()[1:4] == b"PNG"


def test_exits_at_a_mean_depth() -> None:
    score = torch.tensor([[1.0, 4.0, 5.0, 5.0], [0.0, 2.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0]])
    for depth in (1.0, 1.75, 2.0, 2.25, 2.9, 3.0):
        exits = exits_by_score(score, depth)
        assert exits is not None
        assert exits.mean(lambda loops: loops.double().mean()).item() == pytest.approx(depth)
    exact = exits_by_score(score, 2.25)
    assert exact is not None
    mixed = [exact.shallow.tolist(), exact.deep.tolist()]
    assert [1, 2, 3, 3] in mixed, "token 0 leaves at once, token 1 after its drop"
    score[0] = torch.inf
    assert exits_by_score(score, 1.5) is None


def test_the_oracle_is_the_best_of_all_choices() -> None:
    loss = torch.rand((3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    choices = np.stack(np.meshgrid(*[range(3)] * 5), -1).reshape(-1, 5)
    values = torch.stack([loss[torch.from_numpy(choice), torch.arange(5)].mean() for choice in choices])
    for total in range(5, 16):
        exits = oracle_exits(loss, total / 5)
        assert exits is not None
        found = exits.mean(lambda loops: loss.gather(0, loops[None] - 1).mean()).item()
        best = values[torch.from_numpy(choices.sum(1) + 5 <= total)].min().item()
        assert found <= best + 1e-9
        assert exits.mean(lambda loops: loops.double().mean()).item() <= total / 5 + 1e-9


def test_tokens_have_classes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode("kalo xyz_7(kalo)\n  12")
    pieces = [tokenizer.decode([token]) for token in ids]
    classes = [CLASSES[number] for number in token_classes(tokenizer, torch.tensor([ids]))[0].tolist()]
    by_piece = dict(zip(pieces, classes, strict=True))
    assert classes[0] == "word start"
    assert by_piece["("] == by_piece[")"] == "punctuation"
    assert by_piece["1"] == by_piece["2"] == by_piece["7"] == "digit"
    assert classes[pieces.index("(") + 1] == "word start", "after a bracket a word begins"
    assert classes[pieces.index("_")] == "continuation"
    assert "whitespace" in classes


def test_pre_training_a_gate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.halting.*mythos-ds train-gate") as caught:
        load_config("tiny", ["model.halting=gate"])
    assert len(caught.value.problems) == 1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A data folder with a built-in corpus of made-up words."""
    folder = tmp_path / "data" / "builtin"
    folder.mkdir(parents=True)
    texts = make_texts(60)
    make_dataset(folder / "tokens", make_tokenizer(folder), texts)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder.parent


def tool() -> ModuleType:
    return load_main("tools/train_gate.py")


def run(module: ModuleType, *arguments: object) -> int:
    return module.run_tool(module.parser(), module.work, [str(argument) for argument in arguments])


def test_the_tool_trains_writes_and_refuses(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, model, output = tool(), tmp_path / "model", tmp_path / "gated"
    save_model(randomise(MythosModel(toy_config(vocab_size=400))), model, {"seq_len": 32})
    (tmp_path / "other").mkdir()
    tokenizer = make_tokenizer(tmp_path / "other", seed=5, vocab_size=380).path
    (model / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    command = ["--model", model, "--output", output, "--data-dir", corpus, "--seq-len", 16, "--batch", 2]
    assert run(module, *command, "--steps", 3) == 0
    gated = load_model(output)
    assert gated.config.halting == "gate"
    assert read_metadata(output)["seq_len"] == 32
    assert read_metadata(output)["gate"]["steps"] == 3
    assert (output / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    old = load_model(model).state_dict()
    assert all(torch.equal(value, old[name]) for name, value in gated.state_dict().items() if name in old)
    capsys.readouterr()
    for wrong, said in (
        ([*command, "--steps", 3], "holds a model"),
        (["--model", output, "--output", tmp_path / "x"], '"gate"'),
        (["--model", tmp_path, "--output", tmp_path / "x"], "config.json"),
        ([*command[:2], "--output", tmp_path / "x", "--lr", "nan"], "--lr"),
        ([*command[:2], "--output", tmp_path / "x", "--loops", 1], "nearest: 2"),
    ):
        assert run(module, *wrong) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_the_text_has_the_models_own_tokens(corpus: Path, tmp_path: Path) -> None:
    request = {"seq_len": 16, "train_samples": 4, "valid_samples": 2, "seed": 0, "vocab_size": 400}
    own = open_text(corpus, tmp_path / "none", **request)
    assert own.tokenizer.sha256 == Tokenizer.load(corpus / "builtin" / "tokenizer.model").sha256
    (tmp_path / "other").mkdir()
    other = make_tokenizer(tmp_path / "other", seed=5, vocab_size=380)
    foreign = open_text(corpus, other.path, **request)
    assert foreign.tokenizer.sha256 == other.sha256
    assert other.decode(foreign.train[0]["tokens"]).split()[1] in " ".join(make_texts(60))
