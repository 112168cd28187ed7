"""Weights of every kind as the start of a run: the model section they imply, and their tensors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_ds.api import convert
from mythos_ds.cluster.preflight.host_facts import gather
from mythos_ds.config.loader import LoadedConfig, load_config
from mythos_ds.config.resolve import resolve, resolve_stages
from mythos_ds.conversion.init_config import file_text, init_config
from mythos_ds.conversion.openmythos import openmythos_config
from mythos_ds.conversion.starting_weights import open_starting_weights
from mythos_ds.costs.dry_run import dry_run_report
from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import save_model
from mythos_ds.weights.reader import StartingWeights
from tests.helpers.toy_model import toy_config

TRAINING: dict[str, Any] = {
    "seq_len": 16,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "max_steps": 2,
    "lr": 0.01,
    "depth_distribution": "poisson",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights") / "model"
    model = MythosModel(toy_config(lora_rank=0), seed=3)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1.5)
    save_model(model, made, {})
    return made


def loaded(path: Path, weights: Path | str, *overrides: str, **model: Any) -> LoadedConfig:
    """A run file without a model section, but for `model`."""
    sections: dict[str, Any] = {"training": {**TRAINING, "init_from": str(weights)}}
    sections["data"] = {"datasets": [{"prefix": "unused"}], "tokenizer": "unused"}
    if model:
        sections["model"] = model
    file = path / "run.json"
    file.write_text(json.dumps(sections))
    return load_config(str(file), overrides)


def opened(run: LoadedConfig) -> StartingWeights:
    return open_starting_weights(resolve(run.config, 1), 0)


def assert_equal(weights: StartingWeights, folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    assert set(weights.source.specs()) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(weights.source.read(name), value), name


def test_the_folder_gives_the_model_section(folder, tmp_path):
    run = loaded(tmp_path, folder)
    assert run.config.model == toy_config(lora_rank=0)
    weights = opened(run)
    assert_equal(weights, folder)
    assert weights.identity["name"] == "model"
    again = opened(loaded(tmp_path, folder, "model.mean_recurrence=2", "model.max_loops=4"))
    assert again.identity == weights.identity


@pytest.mark.parametrize("given", ["tiny", "tiny/", "models/tiny/"])
def test_the_built_in_model(given, tmp_path):
    weights = opened(loaded(tmp_path, given))
    assert weights.identity["name"] == "tiny"


def test_settings_of_one_meaning_agree(folder, tmp_path):
    own = toy_config(lora_rank=0)
    save_model(MythosModel(toy_config(lora_rank=0, n_kv_heads=4, head_dim=None)), tmp_path / "left_out", {})
    loaded(tmp_path, tmp_path / "left_out", n_kv_heads=None, head_dim=8, no_rope_layers=[], shared_expert_dim=12)
    loaded(tmp_path, folder, head_dim=None, shared_expert_dim=own.expert_dim, rope_scaling=None)
    with pytest.raises(ConfigError, match=r"model\.n_kv_heads: null given; the weights of .* have 2"):
        loaded(tmp_path, folder, n_kv_heads=None)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, folder, dim="32")
    assert len(caught.value.problems) == 1


def test_what_an_export_holds_is_the_same_model(folder, tmp_path):
    convert(folder, tmp_path / "hf", dtype="float32")
    run = loaded(tmp_path, tmp_path / "hf")
    assert run.config.model.model_copy(update={"shared_expert_dim": None}) == toy_config(lora_rank=0)
    assert_equal(opened(run), folder)


def test_openmythos_weights_that_hold_their_configuration(tmp_path):
    fields = {
        "vocab_size": 60, "dim": 24, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 64, "max_loop_iters": 4,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": "gqa", "n_experts": 4, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 16, "lora_rank": 4,
    }  # fmt: skip
    absent = {"act_threshold": 0.99, "rope_theta": 500000.0}
    config = openmythos_config(SimpleNamespace(**fields, **absent))
    save_model(MythosModel(config, seed=1), tmp_path / "own", {})
    convert(tmp_path / "own", tmp_path / "theirs", to_format="openmythos")
    place = tmp_path / "saved"
    place.mkdir()
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    torch.save({"model": tensors, "cfg": fields}, place / "last.pt")
    for given in (place, place / "last.pt"):
        weights = opened(loaded(tmp_path, given))
        assert_equal(weights, tmp_path / "own")
        assert weights.identity["kind"] == "openmythos"


def test_another_digest_for_other_weights(folder, tmp_path):
    other = tmp_path / "other"
    save_model(MythosModel(toy_config(lora_rank=0), seed=4), other, {})
    assert opened(loaded(tmp_path, other)).identity["sha256"] != opened(loaded(tmp_path, folder)).identity["sha256"]


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"dim": 64}, "have 32; nearest: 32"),
        ({"rope_theta": 5e5}, "have 10000.0"),
        ({"vocab_size": 39}, "have 40 or more; nearest: 40"),
        ({"tie_embeddings": True}, "have false"),
        ({"n_experts": 16}, "have 8"),
    ],
)
def test_a_model_section_that_contradicts_the_weights_is_refused(changes, allowed, folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, folder, **changes)
    (problem,) = caught.value.problems
    assert f"model.{next(iter(changes))}: " in problem
    assert allowed in problem


def test_a_larger_vocabulary_gets_the_mean_of_the_rows(folder, tmp_path):
    run = loaded(tmp_path, folder, vocab_size=50)
    weights = opened(run)
    assert any("10 rows added" in note for note in weights.notes)
    own = load_file(folder / "model.safetensors")
    for name in ("embed.weight", "lm_head.weight"):
        value, mean = weights.source.read(name), own[name].double().mean(0).float()
        assert torch.equal(value[:40], own[name])
        assert torch.allclose(value[40:], mean.expand(10, -1), atol=1e-7)
        for rows in (slice(0, 7), slice(38, 43), slice(40, 41), slice(44, 50)):
            assert torch.equal(weights.source.read(name, rows), value[rows])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight: not in the given weights"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra: not a tensor"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(2)}), "norm.weight: has the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(damage, named, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"{other}: {named}"):
        opened(loaded(tmp_path, other))


def test_a_gate_is_left_out(tmp_path):
    config = toy_config(lora_rank=0, halting="gate")
    save_model(MythosModel(config), tmp_path / "gated", {})
    with pytest.raises(ConfigError, match=r"model\.halting"):
        loaded(tmp_path, tmp_path / "gated")
    weights = opened(loaded(tmp_path, tmp_path / "gated", halting="none"))
    assert not any("gate." in name for name in weights.source.specs())
    assert weights.notes == ("the trained exit gate is left out",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "model_type None"),
        ({"config.json": '{"model_type": "gpt2"}'}, "model_type 'gpt2'"),
        ({"config.json": "{"}, "Invalid JSON"),
        ({"config.json": "[]"}, "has no config.json"),
        ({"config.json": '{"model": {"dim": "x"}}'}, "config.json: model.vocab_size: Field required"),
        ({"config.json": '{"model_type": "mythos", "rope_parameters": [1]}'}, "rope_parameters: given [1]"),
        ({"config.json": '{"model_type": "mythos", "mythos": 3}'}, "mythos: given 3; allowed: an object"),
        ({"config.json": '{"model_type": "llama", "num_hidden_layers": 6}'}, "model.prelude_layers"),
    ],
)
def test_what_is_no_model_is_one_message(content, message, tmp_path):
    place = tmp_path / "given"
    if content is not None:
        place.mkdir()
        for name, text in content.items():
            (place / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, place)
    problem, *others = caught.value.problems
    assert all("training.init_from: " in found for found in (problem, *others))
    assert message in problem


@pytest.mark.parametrize(
    ("name", "message"), [("a" * 300, "not readable"), ("org/model", "hf download org/model"), ("README.md", "a file")]
)
def test_a_name_that_is_no_model_is_one_message(name, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, name)
    (problem,) = caught.value.problems
    assert "training.init_from: " in problem
    assert message in problem


def test_weights_that_are_not_here_matter_at_the_start_only(tmp_path):
    whole = toy_config(lora_rank=0).model_dump(mode="json")
    run = loaded(tmp_path, tmp_path / "elsewhere", **whole)
    assert run.config.model == toy_config(lora_rank=0)
    assert "elsewhere, which is not here" in dry_run_report(resolve(run.config, 1))
    (told,) = gather(resolve_stages(run.stages, 1), tmp_path / "run", None, write=False)["data"][-1:]
    assert "elsewhere: not there" in told
    with pytest.raises(ConfigError, match=r"training\.init_from: given .*elsewhere; no such file or folder"):
        opened(run)
    with pytest.raises(ConfigError, match="no such file or folder"):
        loaded(tmp_path, tmp_path / "elsewhere", dim=32)


def test_unknown_keys_of_an_export_are_reported(folder, tmp_path):
    convert(folder, tmp_path / "hf", dtype="float32")
    (tmp_path / "hf/checksums.json").unlink()
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "frobnicate": 1}))
    assert any("frobnicate: not known" in note for note in opened(loaded(tmp_path, tmp_path / "hf")).notes)


def test_a_cut_that_cannot_be_made_is_told_in_the_settings_of_the_file(tmp_path):
    source = tmp_path / "dense"
    source.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    hf = {"model_type": "llama", "vocab_size": 40, "rms_norm_eps": 1e-5, **sizes}
    (source / "config.json").write_text(json.dumps(hf))
    cut = {"prelude_layers": 2, "recurrent_layers": 2, "coda_layers": 1}
    with pytest.raises(ConfigError, match=r"model\.n_experts: given 6; .* model\.expert_dim = 4; nearest: 4"):
        loaded(tmp_path, source, **cut, n_experts=6)


def test_init_config_writes_a_run_that_loads(folder, tmp_path):
    run, notes = init_config(
        folder, load_config("tiny"), ["training.max_steps=9", "data.tokenizer=t"], data=[tmp_path / "text"]
    )
    path = tmp_path / "made.json"
    path.write_text(file_text(run))
    again = load_config(str(path)).config
    assert again == run.config
    assert again.model == toy_config(lora_rank=0)
    assert again.training.init_from == str(folder)
    assert (again.training.max_steps, (again.data.datasets or [])[0].prefix) == (9, str(tmp_path / "text"))
    assert again.training.lr == load_config("tiny").config.training.lr
    assert any("no tokenizer" in note for note in notes)


def test_init_config_of_the_built_in_model_loads(tmp_path):
    """Its configuration is older than some keys."""
    run, _ = init_config(Path("tiny"), load_config("tiny"))
    (tmp_path / "made.json").write_text(file_text(run))
    assert load_config(str(tmp_path / "made.json")).config == run.config


def test_init_config_names_the_weights_tokenizer(tmp_path):
    run, notes = init_config(Path("tiny"), load_config("tiny"), data=[tmp_path / "text"])
    assert str(run.config.data.tokenizer).endswith("models/tiny/tokenizer.model")
    assert notes == []
    _, notes = init_config(Path("tiny"), load_config("tiny"), [f"data.data_dir={tmp_path}"])
    assert "prepare-data INPUT --tokenizer tiny" in notes[0]


class Wrapped:
    """What a trainer may have put beside the weights."""


def test_a_file_that_is_trusted_is_also_trusted_by_the_check_of_the_configuration(tmp_path):
    fields = {"vocab_size": 60, "dim": 24, "n_heads": 2, "max_seq_len": 64, "max_loop_iters": 4, "prelude_layers": 1}
    fields |= {"coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 16, "lora_rank": 4}
    cfg = {**fields, "n_kv_heads": 1, "attn_type": "gqa", "n_shared_experts": 1}
    config = openmythos_config(SimpleNamespace(**cfg, act_threshold=0.99, rope_theta=500000.0))
    save_model(MythosModel(config, seed=1), tmp_path / "own", {})
    convert(tmp_path / "own", tmp_path / "theirs", to_format="openmythos")
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    torch.save({"model": tensors, "cfg": cfg, "logger": Wrapped()}, tmp_path / "last.pt")
    with pytest.raises(ConfigError, match="--allow-pickle"):
        loaded(tmp_path, tmp_path / "last.pt")
    trusted = load_config(str(tmp_path / "run.json"), allow_pickle=True)
    weights = open_starting_weights(resolve(trusted.config, 1), 0, allow_pickle=True)
    assert_equal(weights, tmp_path / "own")


@pytest.mark.parametrize(("window", "seq_len"), [(64, 16), (64, 64), (64, 65), (16, 128), (None, 128), (512, 256)])
def test_a_window_is_compared_with_the_length_of_the_run(tmp_path, window, seq_len):
    source = {"model_type": "mistral", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64}
    source |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    source |= {"max_position_embeddings": 1024, "sliding_window": window}
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source))
    cut = {"prelude_layers": 1, "recurrent_layers": 2, "coda_layers": 1, "max_loops": 4, "mean_recurrence": 2}
    cut |= {"n_experts": 4, "n_experts_per_tok": 1, "expert_dim": 64}
    loaded(tmp_path, folder, "training.seq_len=16", **cut)
    if window is None or seq_len <= window:
        run = loaded(tmp_path, folder, f"training.seq_len={seq_len}", **cut)
        assert run.config.model.dim == 48
        return
    told = rf"sliding_window: given {window}, shorter than .* {seq_len} .*training\.seq_len"
    with pytest.raises(ConfigError, match=told):
        loaded(tmp_path, folder, f"training.seq_len={seq_len}", **cut)
