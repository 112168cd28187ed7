"""The conversion tool as a user calls it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mythos_ds.mains import run_tool
from mythos_ds.weights.model_folder import TOKENIZER, load_model, read_metadata
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT

convert_checkpoint = load_main("tools/convert_checkpoint.py")

TINY = ROOT / "models" / "tiny"
Capture = pytest.CaptureFixture[str]


def _run(source: str, target: str, folder: Path, output: Path, *more: object) -> int:
    arguments = ["--from", source, "--to", target, "--input", folder, "--output", output, *more]
    return run_tool(convert_checkpoint.parser(), convert_checkpoint.work, [str(each) for each in arguments])


@pytest.fixture
def openmythos(tmp_path: Path) -> Path:
    oracle = pytest.importorskip("open_mythos.main")
    torch.manual_seed(0)
    config = oracle.MythosConfig(
        vocab_size=61, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=32, max_loop_iters=2, prelude_layers=1,
        coda_layers=1, attn_type="gqa", n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=8, lora_rank=4,
    )  # fmt: skip
    folder = tmp_path / "open"
    folder.mkdir()
    torch.save(oracle.OpenMythos(config).state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_openmythos_there_and_back(openmythos: Path, tmp_path: Path, capsys: Capture) -> None:
    assert _run("openmythos", "mythos", openmythos, tmp_path / "ours", "--max-file-bytes", 20_000, "--jobs", 2) == 0
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert read_metadata(tmp_path / "ours") == {"source": "open-mythos", "seq_len": 32}
    load_model(tmp_path / "ours")
    assert _run("mythos", "openmythos", tmp_path / "ours", tmp_path / "back") == 0
    back, state = load_file(tmp_path / "back" / "model.safetensors"), torch.load(openmythos / "weights.pt")
    assert set(state) - set(back) == {"freqs_cis", "freqs_cis_mla"}
    assert all(torch.equal(back[name], state[name]) for name in back)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    given = json.loads((openmythos / "config.json").read_text())
    assert {name: value for name, value in given.items() if name != "max_output_tokens"} == fields
    assert _run("openmythos", "mythos", openmythos, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert load_file(tmp_path / "half" / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    capsys.readouterr()


def test_a_dense_model_is_cut_and_the_dropped_layers_are_said(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    cut = ("--prelude", 1, "--recurrent", 2, "--coda", 1, "--granularity", 2, "--experts", 6, "--experts-per-token", 2)
    assert _run("hf", "mythos", llama, tmp_path / "out", *cut) == 0
    output = capsys.readouterr()
    assert "dropped: source layers 1-2" in output.out
    assert "no tokenizer is written" in output.out
    assert "converting" in output.err
    model = load_model(tmp_path / "out")
    assert (model.config.n_experts, model.config.route_scale) == (6, 2.0)
    assert read_metadata(tmp_path / "out")["layers"]["recurrent"] == [3, 4]
    assert not (tmp_path / "out" / TOKENIZER).exists()


def test_dry_run_says_what_it_takes_and_writes_nothing(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    cut = ("--prelude", 1, "--recurrent", 2, "--coda", 1)
    assert _run("hf", "mythos", llama, tmp_path / "out", *cut, "--dry-run", "--bandwidth", 1e6, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["written"]
    assert not (tmp_path / "out").exists()
    plan: dict[str, Any] = result["estimate"]
    assert _run("hf", "mythos", llama, tmp_path / "out", *cut, "--json") == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (plan["tensors"], plan["files"]) == (len(written), 1)
    assert plan["bytes"] == sum(value.nbytes for value in written.values())
    assert plan["hours"] == pytest.approx(2 * plan["bytes"] / 1e6 / 3600, rel=0.01), "read once, written once"
    assert plan["peak_bytes_per_worker"] > 0


def test_an_interrupted_conversion_goes_on(openmythos: Path, tmp_path: Path, capsys: Capture) -> None:
    """What a kill leaves: some finished files, and no index and no configuration."""
    arguments = ("openmythos", "mythos", openmythos)
    assert _run(*arguments, tmp_path / "whole", "--max-file-bytes", 20_000) == 0
    assert _run(*arguments, tmp_path / "cut", "--max-file-bytes", 20_000) == 0
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    for name in ("config.json", "model.safetensors.index.json", files[0].name):
        (tmp_path / "cut" / name).unlink()
    before = files[1].stat().st_mtime_ns
    assert _run(*arguments, tmp_path / "cut", "--max-file-bytes", 20_000) == 0
    assert files[1].stat().st_mtime_ns == before
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes(), file.name
    capsys.readouterr()


def test_what_has_no_effect_or_does_not_fit_is_one_message(
    llama: Path, openmythos: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    cut = ("--prelude", 1, "--recurrent", 2, "--coda", 1)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("mythos", "mythos", TINY, out), "--from mythos --to mythos: given"),
        (("hf", "openmythos", llama, out), "others go through mythos"),
        (("openmythos", "mythos", openmythos, out, "--with-remote-code"), "--with-remote-code: given with --to mythos"),
        (("openmythos", "mythos", openmythos, out, "--dtype", "fp8"), "--dtype: given fp8"),
        (("mythos", "openmythos", TINY, out, "--dtype", "float32"), "--dtype: given with --to openmythos"),
        (("mythos", "openmythos", TINY, out), 'model.injection: given "pre"'),
        (("openmythos", "mythos", openmythos, out, "--prelude", 1), "--prelude: given with --from openmythos"),
        (("mythos", "hf", TINY, out, "--allow-pickle"), "--allow-pickle: given for"),
        (("hf", "mythos", llama, out, *cut, "--allow-pickle"), "whose weights are not pickled"),
        (("openmythos", "mythos", openmythos, out, "--bandwidth", 1), "--bandwidth: given without --dry-run"),
        (("openmythos", "mythos", openmythos, out, "--dry-run", "--bandwidth", "nan"), "--bandwidth: given nan"),
        (("openmythos", "mythos", openmythos, out, "--data-dir", out), "--data-dir: given without --evaluate"),
        (("openmythos", "mythos", openmythos, out, "--evaluate"), "--evaluate: given with --to mythos"),
        (("openmythos", "mythos", openmythos, openmythos), "which is the input"),
        (("openmythos", "mythos", openmythos, llama / "config.json"), "which is a file"),
        (("hf", "mythos", llama, out), "--prelude: not given; needed"),
        (("hf", "mythos", llama, out, "--prelude", 5, *cut[2:]), "at most the 6 of the source"),
        (("hf", "mythos", openmythos, out), "model_type None"),
        (("openmythos", "mythos", tmp_path / "none", out), "not readable"),
        (("openmythos", "mythos", openmythos, out, "--jobs", 0), "--jobs: given 0"),
        (("mythos", "hf", llama, out), "not a model folder"),
    ]
    for arguments, message in cases:
        assert _run(*arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not out.exists(), message


def test_an_export_says_its_type_and_how_it_is_opened(tmp_path: Path, capsys: Capture) -> None:
    assert _run("mythos", "hf", TINY, tmp_path / "hf") == 0
    printed = capsys.readouterr().out
    assert "matrices in bfloat16, the default; --dtype float32 keeps the logits\n" in printed
    assert "`import mythos_hf`; without that package: --with-remote-code" in printed
    card = (tmp_path / "hf" / "README.md").read_text()
    assert 'tokenizer("The", return_tensors="pt", add_special_tokens=False)' in card
    assert _run("mythos", "hf", TINY, tmp_path / "exact", "--dtype", "float32", "--with-remote-code") == 0
    printed = capsys.readouterr().out
    assert "matrices in float32\n" in printed
    assert "import mythos_hf" not in printed


def test_an_output_of_something_else_is_refused_before_the_bar(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run("mythos", "hf", TINY, tmp_path / "hf") == 0
    monkeypatch.setattr(convert_checkpoint, "byte_progress", lambda *_: pytest.fail("a bar"))
    assert _run("mythos", "hf", TINY, tmp_path / "hf", "--dtype", "float32") == 2
    message = capsys.readouterr().err
    assert "of something else, made from tiny (mythos to hf, bfloat16) by convert; choose an empty folder" in message
