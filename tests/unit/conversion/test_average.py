"""Means of models: the arithmetic, what is not averaged, and which models are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.average import Mean, similarity
from mythos_ds.mains import run_tool
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import TOKENIZER, load_model, save_model
from mythos_ds.weights.reader import TensorFolder
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT

average_checkpoints = load_main("tools/average_checkpoints.py")

TINY = json.loads((ROOT / "models" / "tiny" / "config.json").read_text())["model"]
CONFIG = ModelConfig.model_validate({**TINY, "vocab_size": 64, "dim": 32, "ffn_dim": 48, "expert_dim": 16})
BUFFERS = ("bias", "loop_bias", "loop_updates")


def _folder(path: Path, seed: int, steps: int = 0, config: ModelConfig = CONFIG) -> Path:
    """A model that took `steps` random steps away from the initial values of `seed`."""
    model = MythosModel(config, seed=seed)
    generator = torch.Generator().manual_seed(100 + steps)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(0.01 * steps * torch.randn(value.shape, generator=generator))
    save_model(model, path, {"tokens": 10 * steps, "training": {"seed": seed}, "losses": {"1": 3.0}})
    (path / TOKENIZER).write_bytes(b"a tokenizer")
    return path


def _run(*arguments: object) -> int:
    return run_tool(average_checkpoints.parser(), average_checkpoints.work, [str(each) for each in arguments])


def test_the_mean_is_weighted_and_router_state_is_the_lasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [_folder(tmp_path / f"m{i}", 0, i) for i in (1, 2, 3)]
    assert _run(*folders, "--output", tmp_path / "out", "--weights", 1, 2, 5, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == [0.125, 0.25, 0.625]
    assert result["not_averaged"] == [f"recurrent.layers.0.moe.router.{name}" for name in BUFFERS]
    assert result["recorded"] == {"seed": [0, 0, 0], "tokens": [10, 20, 30]}
    assert min(result["cosine_with_last"]) > 0.9
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    mean = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in mean.items():
        expected = sum(weight * part[name].double() for weight, part in zip(result["weights"], parts, strict=True))
        expected = parts[-1][name].double() if name in result["not_averaged"] else expected
        assert (value - expected).abs().max() <= 1e-6, name
    load_model(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["facts"]
    assert [each["weight"] for each in facts["averaged"]] == result["weights"]
    assert "losses" not in facts
    assert (tmp_path / "out" / TOKENIZER).read_bytes() == b"a tokenizer"


def test_sums_are_fp32_and_cast_once(tmp_path: Path) -> None:
    """1 + 1/256 and 1 have the mean 1 + 1/512, which bf16 rounds; three such roundings would drift."""
    values = [1.0, 1.0 + 2**-7, 1.0 + 2**-6]
    for i, value in enumerate(values):
        (tmp_path / str(i)).mkdir()
        save_file({"w": torch.full((4, 4), value, dtype=torch.bfloat16)}, tmp_path / str(i) / "model.safetensors")
    mean = Mean([TensorFolder(tmp_path / str(i)) for i in range(3)], [1.0, 1.0, 1.0]).read("w", slice(1, 3))
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, torch.full((2, 4), 1.0 + 2**-7, dtype=torch.bfloat16))


def test_models_of_other_starts_are_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = _folder(tmp_path / "one", 0), _folder(tmp_path / "other", 1)
    assert abs(similarity(TensorFolder(one), TensorFolder(other))) < 0.05
    assert _run(one, other, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "cosine of" in error
    assert "--force" in error
    assert not (tmp_path / "out").exists()
    assert _run(one, other, "--output", tmp_path / "out", "--force") == 0
    load_model(tmp_path / "out")


def test_a_width_that_is_written_out_is_that_of_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grouped = {"attn_type": "gqa", "n_heads": 2, "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": None}
    plain = CONFIG.model_copy(update={**grouped, "qk_rope_head_dim": None, "v_head_dim": None})
    shared = {"n_shared_experts": 1, "init_std": 0.5}
    written = plain.model_copy(update={"head_dim": plain.dim // 2, "n_kv_heads": 2})
    folders = [_folder(tmp_path / name, 0, 1, config.model_copy(update=extra)) for name, config, extra in (
        ("null", plain, {"n_shared_experts": 1}),
        ("written", written, {**shared, "shared_expert_dim": plain.expert_dim}),
        ("other", written, {**shared, "head_dim": 8}),
    )]  # fmt: skip
    assert _run(*folders[:2], "--output", tmp_path / "out") == 0
    assert _run(folders[0], folders[2], "--output", tmp_path / "mixed") == 2
    assert "has head_dim 8" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [_folder(tmp_path / f"m{i}", 0, i) for i in (1, 2)]
    assert _run(*folders, "--output", tmp_path / "out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "nothing written" in out
    assert "router.loop_bias" in out
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_folder_keeps_its_companions(tmp_path: Path) -> None:
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = {"model.w": torch.eye(3) + i, "model.gate.e_score_correction_bias": torch.full((3,), float(i))}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "other", "transformers_version": f"5.{i}"}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text("{}")
    assert _run(tmp_path / "0", tmp_path / "1", "--output", tmp_path / "out") == 0
    mean = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(mean["model.w"], torch.eye(3) + 0.5)
    assert torch.equal(mean["model.gate.e_score_correction_bias"], torch.ones(3))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "checksums.json", "tokenizer.json", "generation_config.json"
    }  # fmt: skip


def test_what_does_not_belong_together_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = _folder(tmp_path / "one", 0, 1), _folder(tmp_path / "two", 0, 2)
    wider = _folder(tmp_path / "wider", 0, config=CONFIG.model_copy(update={"ffn_dim": 64}))
    foreign = tmp_path / "foreign"
    shutil.copytree(two, foreign)
    (foreign / TOKENIZER).write_bytes(b"another")
    lacking = tmp_path / "lacking"
    shutil.copytree(two, lacking)
    tensors = load_file(lacking / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "norm.weight"}, lacking / "model.safetensors")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps({"model_type": "mythos", "quantization_config": {}}))
    cases = [
        ((one,), "models: given 1"),
        ((one, wider), "has ffn_dim 64"),
        ((one, foreign), "another tokenizer"),
        ((one, lacking), "norm.weight is in it or in the last one"),
        ((one, quantised), "is quantised"),
        ((one, tmp_path / "none"), "not readable"),
        ((one, two, "--weights", 1), "--weights: given 1"),
        ((one, two, "--weights", 1, -1), "--weights: given 1 -1"),
        ((one, two, "--jobs", 0), "--jobs: given 0"),
    ]
    for given, message in cases:
        assert _run(*given, "--output", tmp_path / "out") == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert _run(one, two, "--output", two) == 2
    assert "which is averaged" in capsys.readouterr().err
