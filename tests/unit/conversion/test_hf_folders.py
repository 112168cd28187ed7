"""Hugging Face folders through the conversion tool, in fp8 too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mythos_ds.conversion.fp8 import SCALE, dequantised
from mythos_ds.mains import run_tool
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT

convert_checkpoint = load_main("tools/convert_checkpoint.py")

TINY = ROOT / "models" / "tiny"
Capture = pytest.CaptureFixture[str]


def _run(source: str, target: str, folder: Path, output: Path, *more: object) -> int:
    arguments = ["--from", source, "--to", target, "--input", folder, "--output", output, *more]
    return run_tool(convert_checkpoint.parser(), convert_checkpoint.work, [str(each) for each in arguments])


def test_fp32_comes_back_bit_equal(tmp_path: Path) -> None:
    assert _run("mythos", "hf", TINY, tmp_path / "hf", "--dtype", "float32") == 0
    assert _run("hf", "mythos", tmp_path / "hf", tmp_path / "back") == 0
    given, back = load_file(TINY / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert given.keys() == back.keys()
    assert all(torch.equal(given[name], back[name]) for name in given)


def test_fp8_quantises_matrices_and_keeps_the_rest_as_in_bf16(tmp_path: Path, capsys: Capture) -> None:
    assert _run("mythos", "hf", TINY, tmp_path / "half") == 0
    assert _run("mythos", "hf", TINY, tmp_path / "whole", "--dtype", "float32") == 0
    capsys.readouterr()
    assert _run("mythos", "hf", TINY, tmp_path / "fp8", "--dtype", "fp8") == 0
    assert "not multiples of 128" in capsys.readouterr().out, "the keys of tiny are 64 high"
    half, whole, given = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole", "fp8"))
    back = dequantised(tmp_path / "fp8")
    scaled = {name.removesuffix(SCALE) for name in given if name.endswith(SCALE)}
    assert set(given) - {name + SCALE for name in scaled} == set(half)
    for name, value in half.items():
        if name in scaled:
            error = (back.read(name) - whole[name]).norm()
            assert given[name].dtype == torch.float8_e4m3fn
            assert error <= 0.03 * whole[name].norm(), name
        else:
            assert torch.equal(given[name], value), name
    assert len(scaled) == 2 * 7 + 4 + 3 * (16 + 1), "prelude and coda, the block's attention, experts and shared expert"
    content = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert content["weight_block_size"] == [128, 128]
    assert not set(content["modules_to_not_convert"]) & {name.removesuffix(".weight") for name in scaled}


def test_what_has_no_effect_is_refused(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert _run("mythos", "hf", TINY, tmp_path / "hf") == 0
    capsys.readouterr()
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("hf", "mythos", tmp_path / "hf", out, "--prelude", 1), "--prelude: given for a mythos model"),
        (("hf", "mythos", tmp_path / "hf", out, "--with-remote-code"), "--with-remote-code: given with --to mythos"),
        (("hf", "mythos", tmp_path / "hf", out, "--evaluate"), "--evaluate: given with --to mythos"),
        (("mythos", "hf", TINY, out, "--data-dir", out), "--data-dir: given without --evaluate"),
        (("hf", "mythos", tmp_path / "hf", out, "--dtype", "fp8"), "--dtype: given fp8"),
    ]
    for arguments, message in cases:
        assert _run(*arguments) == 2, message
        assert message in capsys.readouterr().err
        assert not out.exists()
