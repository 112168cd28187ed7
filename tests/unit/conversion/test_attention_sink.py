"""The layer that makes the attention sink is found, in a small source where one was planted and in a real model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos_ds.conversion.attention_sink import Sink, describe_sink, find_sink, layers_to_run, search_sink, sink_tokens
from mythos_ds.conversion.retrofit import Cut
from mythos_ds.data.tokenizer import train_tokenizer
from mythos_ds.errors import DataError
from mythos_ds.mains import run_tool
from mythos_ds.weights.pickled import open_weights
from tests.helpers.mains import load_main

transformers = pytest.importorskip("transformers")
convert_checkpoint = load_main("tools/convert_checkpoint.py")
LAYERS, PLANTED, VOCABULARY = 8, 3, 97


def _source(folder: Path, planted: int | None, token: int) -> dict[str, Any]:
    """A random model in which `token` has a channel of its own, which layer `planted` turns into a long state."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_()
        embedding[:, 0] = 0.0
        embedding[token, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        if planted is not None:
            mlp = model.model.layers[planted].mlp
            for projection in (mlp.gate_proj, mlp.up_proj):
                projection.weight[0] = 0.0
                projection.weight[0, 0] = 2.0
            mlp.down_proj.weight[1:, 0] = 30.0
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("planted", [0, PLANTED, LAYERS - 2, None])
def test_the_planted_layer_is_found(tmp_path: Path, planted: int | None) -> None:
    tokens = [5, *range(10, 30)]
    hf = _source(tmp_path, planted, tokens[0])
    seen: list[int] = []
    sink = find_sink(open_weights(tmp_path), hf, tokens, layers_to_run(LAYERS, 0), seen.append)
    assert sink.layer == planted
    assert (sink.ratio > 20) == (planted is not None)
    assert len(seen) == sink.layers == (LAYERS - 1 if planted is None else planted + 1), "later layers are not read"


def test_the_states_are_those_of_the_source(tmp_path: Path) -> None:
    tokens = [5, *range(10, 30)]
    hf = _source(tmp_path, PLANTED, tokens[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    norms = states[PLANTED + 1][0].norm(dim=-1)
    sink = find_sink(open_weights(tmp_path), hf, tokens, LAYERS - 1)
    assert sink.ratio == pytest.approx(float(norms[0] / norms[1:].median()), rel=1e-5)


@pytest.mark.parametrize(
    ("prelude", "said"),
    [
        (PLANTED + 1, f"attention sink: made by source layer {PLANTED}, in the prelude"),
        (PLANTED, f"in the recurrent block, where .* give --prelude at least {PLANTED + 1}"),
        (1, f"dropped: nothing will make it; give --prelude at least {PLANTED + 1}"),
    ],
)
def test_the_conversion_says_where_the_sink_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prelude: int, said: str
) -> None:
    tokens, note = sink_tokens(tmp_path, VOCABULARY, None)
    assert note is not None
    _source(tmp_path / "hf", PLANTED, tokens[0])
    recurrent = LAYERS - 1 - prelude if prelude > 1 else 2
    options = ["--from", "hf", "--to", "mythos", "--input", tmp_path / "hf", "--output", tmp_path / "out"]
    cut = ["--prelude", prelude, "--recurrent", recurrent, "--coda", 1, "--decay", 0.1, "--json"]
    given = [str(option) for option in (*options, *cut)]
    assert run_tool(convert_checkpoint.parser(), convert_checkpoint.work, given) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    found = [line for line in notes if "attention sink" in line]
    assert len(found) == 1
    assert re.search(said, found[0])
    assert "random tokens" in found[0]
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["facts"]
    assert (facts["decay"], facts["attention_sink"]["layer"]) == (0.1, PLANTED)


def test_a_source_without_a_sink_is_said_to_have_none() -> None:
    parts = Cut(prelude=2, recurrent=3, coda=1).layers(6)
    assert layers_to_run(6, 1) == 5
    assert layers_to_run(6, 0) == 5
    assert describe_sink(Sink(None, 1.3, 5), parts).startswith("attention sink: none made by source layers 0-4")


def test_layers_that_cannot_be_run_here_end_the_search(tmp_path: Path) -> None:
    """A window shorter than the context; a cut that leaves such layers out is still looked at."""
    hf = _source(tmp_path, 1, sink_tokens(tmp_path / "none", VOCABULARY, None)[0][0])
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 5
    windows = {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1] * 8}
    smollm3 = {**hf, "model_type": "smollm3", **windows, "layer_types": kinds}
    found = search_sink(open_weights(tmp_path), smollm3, tmp_path, 0, None)
    assert (found.layer, found.layers) == (1, 2)
    windowed = {**smollm3, "layer_types": ["sliding_attention"] * 8}
    unseen = search_sink(open_weights(tmp_path), windowed, tmp_path, 0, None)
    words = describe_sink(unseen, Cut(prelude=2, recurrent=3, coda=1).layers(8))
    assert words == "attention sink: not looked for (its first layers compute what the layers here cannot)"


def test_the_text_is_the_users(tmp_path: Path) -> None:
    """In the source's tokenizer; a text that shows nothing, or that nothing can read, is refused."""
    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven\n" * 40)
    with pytest.raises(DataError, match=r"--text: given .*words\.txt, but the source has no tokenizer"):
        sink_tokens(tmp_path, VOCABULARY, words)
    tokenizer = train_tokenizer([words.read_text()], tmp_path / "tokenizer.model", vocab_size=300)
    tokens, note = sink_tokens(tmp_path, 300, words)
    assert note is None
    assert tokens == tokenizer.encode(words.read_text())[: len(tokens)]
    assert sink_tokens(tmp_path, 20, None)[1] is not None, "pieces that the embedding has no rows for"
    words.write_text("\n\n\n")
    with pytest.raises(DataError, match="allowed: at least 3"):
        sink_tokens(tmp_path, 300, words)
    with pytest.raises(DataError, match="not readable as text"):
        sink_tokens(tmp_path, 300, tmp_path / "missing.txt")
