"""Tokenizer, chat template, licence, card and base model go through every conversion, there and back."""

import json
import shutil
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import mythos_ds
from mythos_ds.conversion.average import SourceModel, write_averaged_side_files
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import CheckpointError
from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import read_metadata
from mythos_ds.weights.writer import write_tensors
from tests.helpers.mains import load_main
from tests.helpers.tokenizers import byte_level_folder, mixed_lines, sentencepiece_model

BESIDE = {"chat_template.jinja", "LICENSE", "SOURCE_README.md", "generation_config.json", "tokenizer_config.json"}
CARD = "---\nlicense: apache-2.0\nbase_model:\n- org/base\n---\n# A source\n"
CUT: dict[str, Any] = {"prelude": 1, "recurrent": 1, "coda": 1}


@pytest.fixture
def source(tmp_path):
    """A small dense model as one downloads it."""
    folder = byte_level_folder(tmp_path / "source")
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6, "do_sample": true}')
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text(CARD)
    return folder


def test_there_and_back_from_a_dense_model(source, tmp_path):
    notes = mythos_ds.convert(source, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    assert not [note for note in notes if "tokenizer" in note]
    mythos_ds.convert(tmp_path / "looped", tmp_path / "hf", dtype="float32")
    mythos_ds.convert(tmp_path / "hf", tmp_path / "again", from_format="hf", to_format="mythos")
    mythos_ds.convert(tmp_path / "again", tmp_path / "hf2", dtype="float32", with_remote_code=True)
    first = Tokenizer.load(source)
    for name in ("looped", "hf", "again", "hf2"):
        folder = tmp_path / name
        assert {path.name for path in folder.iterdir()} >= {*BESIDE, "tokenizer.json"}, name
        own = Tokenizer.load(folder)
        assert (own.sha256, own.eos_id, own.ends()) == (first.sha256, first.eos_id, {0, 2}), name
        assert own.companions.chat_template() == first.companions.chat_template()
        assert (folder / "SOURCE_README.md").read_text() == CARD
        assert (folder / "LICENSE").read_text() == "free"
    for name in ("looped", "again"):
        metadata = read_metadata(tmp_path / name)
        assert (metadata["base_model"], metadata["license"]) == ("org/base", "apache-2.0")
    for name in ("hf", "hf2"):
        card = (tmp_path / name / "README.md").read_text()
        assert "base_model: org/base\nlicense: apache-2.0\n---" in card
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert (generation["eos_token_id"], generation["temperature"]) == ([0, 2], 0.6)
    assert (tmp_path / "hf2" / "tokenization_mythos.py").is_file()
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf2", trust_remote_code=True)
    lines = mixed_lines(50)
    assert made(lines).input_ids == first.encode_all(lines)


def test_a_source_by_the_name_of_its_place_on_the_hub(source, tmp_path):
    place = tmp_path / "models--org--name" / "snapshots" / "abc"
    shutil.copytree(source, place)
    mythos_ds.convert(place, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    assert read_metadata(tmp_path / "looped")["base_model"] == "org/name"
    with pytest.raises(CheckpointError, match="hf download org/name --local-dir name"):
        mythos_ds.convert("org/name", tmp_path / "x", from_format="hf", to_format="mythos", **CUT)


def test_a_conversion_that_loses_the_tokenizer_says_so(source, tmp_path):
    (source / "tokenizer.json").write_text("{")
    notes = mythos_ds.convert(source, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    assert [note for note in notes if note.startswith("no tokenizer is written") and "tokenizer.json" in note]
    assert not (tmp_path / "looped" / "tokenizer.json").exists()


def test_a_sentencepiece_model_with_chat_tokens_beyond_its_pieces(source, tmp_path):
    (source / "tokenizer.json").unlink()
    sentencepiece_model(source / "tokenizer.model", "llama", vocab_size=900)
    size = Tokenizer.load(source / "tokenizer.model").vocab_size
    added = {str(size + i): {"content": token} for i, token in enumerate(("<|im_start|>", "<|im_end|>"))}
    config = {"added_tokens_decoder": added, "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    mythos_ds.convert(source, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    mythos_ds.convert(tmp_path / "looped", tmp_path / "hf", dtype="float32")
    mythos_ds.convert(tmp_path / "hf", tmp_path / "again", from_format="hf", to_format="mythos")
    first = Tokenizer.load(source)
    for name in ("looped", "hf", "again"):
        own = Tokenizer.load(tmp_path / name)
        assert (own.sha256, own.special_tokens, own.vocab_size) == (first.sha256, first.special_tokens, size + 2), name


def test_an_average_and_a_gate_keep_them(source, tmp_path):
    mythos_ds.convert(source, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    (tmp_path / "mean").mkdir()
    model = SourceModel.open(tmp_path / "looped")
    from mythos_ds.weights.reader import TensorFolder

    write_tensors(TensorFolder(model.folder), tmp_path / "mean")
    write_averaged_side_files([model, model], [1, 1], tmp_path / "mean")
    assert {path.name for path in (tmp_path / "mean").iterdir()} >= {*BESIDE, "tokenizer.json"}


def test_an_answer_in_the_chat_template(source, tmp_path, capsys):
    mythos_ds.convert(source, tmp_path / "looped", from_format="hf", to_format="mythos", **CUT)
    generate = load_main("tools/generate.py")
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "say </s>"}]')
    answers = []
    for prompt in ("say </s>", str(tmp_path / "chat.json")):
        arguments = ["--chat", prompt, "--model", str(tmp_path / "looped"), "--tokens", "4", "--temperature", "0"]
        assert run_tool(generate.parser(), generate.work, arguments) == 0
        answers.append(capsys.readouterr().out)
    messages = [{"role": "user", "content": "say </s>"}]
    same = mythos_ds.generate(tmp_path / "looped", messages, new_tokens=4, temperature=0)
    assert answers == [same + "\n"] * 2
    assert run_tool(generate.parser(), generate.work, ["--chat", "hi", "--model", "tiny"]) == 2
    assert "has no chat template" in capsys.readouterr().err
