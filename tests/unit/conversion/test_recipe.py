"""The recipe's cut for models of any depth, and the command that writes a looped model and its run file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.conversion.attention_sink import Sink
from mythos_ds.conversion.recipe import choose_cut, recipe_cut
from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import load_model, read_metadata
from tests.helpers.mains import load_main
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

transformers = pytest.importorskip("transformers")
loop_from_dense = load_main("tools/loop_from_dense.py")
LAYERS = 6
_SIZES = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 8) | {
    "rms_norm_eps": 1e-5
}


def _sink(layer: int | None) -> Sink:
    return Sink(layer, 30.0, 10)


@pytest.mark.parametrize(
    ("layers", "sink", "cut"),
    [
        (30, 11, (12, 10, 8)),
        (30, None, (12, 10, 8)),
        (30, 2, (12, 10, 8)),
        (30, 14, (15, 8, 7)),
        (32, 1, (13, 11, 8)),
        (80, 3, (32, 27, 21)),
        (6, 4, (5, 1, 0)),
        (3, None, (1, 1, 1)),
        (2, 0, (1, 1, 0)),
    ],
)
def test_the_cut_keeps_all_layers_and_the_sink_before_the_block(
    layers: int, sink: int | None, cut: tuple[int, int, int]
) -> None:
    assert tuple(choose_cut(layers, _sink(sink)).values()) == cut
    assert sum(cut) == layers


def test_what_is_given_comes_before_the_recipe() -> None:
    chosen = {"prelude": 12, "recurrent": 10, "coda": 8}
    values = recipe_cut({"decay": 0.2, "experts": 4}, chosen)
    expected = {**chosen, "decay": 0.2, "experts": 4, "granularity": 1, "experts_per_token": 1, "mean_recurrence": 2}
    assert values == {**expected, "max_loops": 6}
    assert recipe_cut({}, chosen)["decay"] == 0.05


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A random Llama with a tokenizer."""
    folder = tmp_path / "dense"
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_dataset(tmp_path / "text", tokenizer, make_texts(60))
    return folder


def _run(*arguments: Any) -> int:
    return run_tool(loop_from_dense.parser(), loop_from_dense.work, [str(argument) for argument in arguments])


def test_the_command_writes_a_model_and_its_run_file(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output", tmp_path / "looped", "--like", "tiny", "--data", tmp_path / "text"]
    assert _run(dense, *given, "training.max_steps=3", "training.seq_len=32") == 0
    printed = capsys.readouterr().out
    assert "attention sink: none" in printed
    model = load_model(tmp_path / "looped")
    assert (model.config.prelude_layers, model.config.recurrent_layers, model.config.coda_layers) == (2, 2, 2)
    assert model.config.n_experts == 1
    assert read_metadata(tmp_path / "looped")["decay"] == 0.05
    config = load_config(str(tmp_path / "looped.json")).config
    assert config.model == model.config
    training = config.training
    assert (training.init_from, training.max_steps) == (str(tmp_path / "looped"), 3)
    assert (training.lr, training.lr_reference_dim, training.schedule) == (1e-4, 32, "wsd")
    assert training.frozen == ["embed.*", "prelude.*"], "the head is the embedding"
    assert set(json.loads((tmp_path / "looped.json").read_text())) >= {"model", "parallel", "training", "data"}
    expected = transformers.AutoModelForCausalLM.from_pretrained(dense)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert (model(tokens, n_loops=1) - expected(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--prelude", 2), "--recurrent: not given; give all of"),
        (("--decay", 1.5), "--decay: given 1.5"),
        (("--like", "nope"), "nope: no such file"),
        (("training.lr=-1",), "training.lr"),
        (("--prelude", 3, "--recurrent", 3, "--coda", 3), "at most the 6 of the source"),
    ],
)
def test_bad_input_is_one_message(
    dense: Path, tmp_path: Path, options: tuple[object, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(dense, "--output", tmp_path / "looped", "--like", "tiny", *options) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "looped.json").exists()


def test_nothing_that_exists_is_overwritten(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, given in ((tmp_path / "x.json", "--config: given"), (tmp_path / "x", "--output: given")):
        path.write_text("{}")
        assert _run(dense, "--output", tmp_path / "x", "--like", "tiny") == 2
        assert given in capsys.readouterr().err
        path.unlink()


def test_a_folder_that_is_no_dense_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"model_type": "llama", **_SIZES}
    for content, named in (({"model_type": "mamba"}, "given 'mamba'"), (one, "num_hidden_layers: given 1")):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, **content}))
        assert _run(tmp_path, "--output", tmp_path / "out", "--like", "tiny") == 2
        assert named in capsys.readouterr().err
