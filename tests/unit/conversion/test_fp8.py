"""fp8 with a scale per block of 128 x 128: error, what is kept, and reading back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mythos_ds.conversion.fp8 import (
    BLOCK,
    LARGEST,
    SCALE,
    Dequantised,
    Fp8Tensors,
    dequantise,
    dequantised,
    quantise,
    quantization_config,
    unaligned,
)
from mythos_ds.errors import CheckpointError
from mythos_ds.weights.reader import InMemorySource
from mythos_ds.weights.writer import write_tensors

KEPT = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight")


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (300, 200),
        "model.layers.1.mlp.experts.3.down_proj.weight": (128, 257),
        "model.layers.0.mlp.up_proj.weight": (64, 64),
        **dict.fromkeys(KEPT, (140, 40)),
        "model.norm.weight": (40,),
    }
    return {name: torch.randn(shape) * torch.logspace(-1, 1, shape[-1]) for name, shape in shapes.items()}


def _source(tensors: dict[str, Tensor], dtype: torch.dtype) -> InMemorySource:
    return InMemorySource({name: value.to(dtype) for name, value in tensors.items()})


def _fp8() -> Fp8Tensors:
    tensors = _tensors()
    return Fp8Tensors(_source(tensors, torch.float32), _source(tensors, torch.bfloat16))


def test_each_block_is_within_3_percent() -> None:
    """Of normal values; blocks differ in size by 10^4, which one scale for the matrix would not survive."""
    torch.manual_seed(1)
    matrix = torch.randn(300, 520) * torch.logspace(-2, 2, 300)[:, None]
    quantised, scale = quantise(matrix)
    assert (quantised.dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.float32, (3, 5))
    back = dequantise(quantised, scale)
    for i in range(0, 300, BLOCK):
        for j in range(0, 520, BLOCK):
            block, own = matrix[i : i + BLOCK, j : j + BLOCK], back[i : i + BLOCK, j : j + BLOCK]
            assert (own - block).norm() <= 0.03 * block.norm()
            assert scale[i // BLOCK, j // BLOCK] == block.abs().max() / LARGEST
    assert (back - matrix).norm() <= 0.03 * matrix.norm()


@pytest.mark.parametrize("value", [0.0, 448.0, 449.0, 1e-30, 3e38])
def test_extreme_values_stay_finite(value: float) -> None:
    back = dequantise(*quantise(torch.full((5, 3), value)))
    assert torch.allclose(back, torch.full((5, 3), value), rtol=1e-6)


def test_the_folder_has_scales_beside_matrices_and_the_rest_bit_equal(tmp_path: Path) -> None:
    source, tensors = _fp8(), _tensors()
    write_tensors(source, tmp_path, max_file_bytes=40_000)
    back = dequantised(tmp_path)
    assert set(back.specs()) == set(tensors)
    for name, value in tensors.items():
        if name in KEPT:
            assert torch.equal(back.read(name), value.bfloat16())
            assert name + SCALE not in source.specs()
        else:
            assert back.specs()[name].dtype == torch.float32
            assert torch.equal(back.read(name), dequantise(*quantise(value)))
            assert (back.read(name) - value).norm() <= 0.03 * value.norm()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(100, 200), slice(127, 129), slice(256, 300), slice(0, 300)])
def test_rows_are_those_of_the_whole(rows: slice) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    source = _fp8()
    whole = source.read(name)
    assert torch.equal(source.read(name, rows).float(), whole[rows].float())
    scale = source.read(name + SCALE)
    blocks = slice(rows.start // BLOCK, rows.stop // BLOCK + 1)
    assert torch.equal(source.read(name + SCALE, slice(blocks.start, min(blocks.stop, 3))), scale[blocks])
    back = Dequantised(source)
    assert torch.equal(back.read(name, rows), back.read(name)[rows])


def test_the_configuration_says_what_is_not_quantised() -> None:
    specs = _fp8().specs()
    assert quantization_config(specs) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"],
    }
    assert unaligned(specs) == ["model.layers.0.self_attn.q_proj.weight"]


def test_a_matrix_is_quantised_from_fp32_only() -> None:
    half = _source(_tensors(), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"allowed: torch\.float32"):
        Fp8Tensors(half, half)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    save_file({"a.q_proj.weight": torch.zeros(3, 3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no scales"):
        dequantised(tmp_path)
