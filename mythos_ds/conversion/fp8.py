"""Matrices in fp8 with a scale per block, as vLLM and transformers read them (DeepSeek-V3, arXiv 2412.19437, 3.3).

`x.weight` in e4m3 and `x.weight_scale_inv` in fp32 [ceil(rows / 128), ceil(columns / 128)]: the weight is q * scale.
Experts, attention and dense feed-forwards are quantised, from fp32; embedding, head, norms, router, injection, LoRA and
loop tables are not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mythos_ds.errors import CheckpointError
from mythos_ds.weights.reader import TensorFolder, TensorSource, TensorSpec

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALE = "_scale_inv"

_QUANTISED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
_FOLLOWED = ("q_proj", "k_proj", "gate_proj", "q_a_proj")
"""Matrices below which servers put another one."""
_STRIP_ELEMENTS = 1 << 22


def is_quantised(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor of the Hugging Face format becomes fp8."""
    path = name.split(".")
    return len(spec.shape) == 2 and path[-1] == "weight" and path[-2] in _QUANTISED


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [m, n] -> e4m3 [m, n] and fp32 scales [ceil(m / 128), ceil(n / 128)]: a block's largest value gives 448."""
    scale = _scales(matrix)
    quantised = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    height = max(1, _STRIP_ELEMENTS // (BLOCK * matrix.shape[1])) * BLOCK  # bounds what is held beside the matrix
    for start in range(0, len(matrix), height):
        strip = matrix[start : start + height]
        own = scale[start // BLOCK : -(-(start + len(strip)) // BLOCK)]
        # e4m3 has no infinity: a value rounded beyond the largest would be NaN.
        exact = (strip / _spread(own, strip.shape)).clamp_(-LARGEST, LARGEST)
        quantised[start : start + height] = exact.to(torch.float8_e4m3fn)
    return quantised, scale


def dequantise(quantised: Tensor, scale: Tensor) -> Tensor:
    """fp32 [m, n] = q * scale of its block."""
    return quantised.float().mul_(_spread(scale, quantised.shape))


def _scales(matrix: Tensor) -> Tensor:
    m, n = matrix.shape
    padded = functional.pad(matrix.abs(), (0, -n % BLOCK, 0, -m % BLOCK))
    largest = padded.unflatten(1, (-1, BLOCK)).amax(-1).unflatten(0, (-1, BLOCK)).amax(1)
    scale = largest / LARGEST
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


class Fp8Tensors:
    """A Hugging Face source with its matrices in fp8.

    exact: the tensors in fp32, from which matrices are quantised. kept: the same in the types of what stays.
    """

    def __init__(self, exact: TensorSource, kept: TensorSource):
        self.exact, self.kept = exact, kept
        self._shapes = {name: spec.shape for name, spec in exact.specs().items() if is_quantised(name, spec)}
        for name in self._shapes:
            if exact.specs()[name].dtype != torch.float32:
                raise CheckpointError(f"{name}: is {exact.specs()[name].dtype}; allowed: torch.float32")

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor; a matrix's scales follow it."""
        specs: dict[str, TensorSpec] = {}
        for name, spec in self.kept.specs().items():
            if name not in self._shapes:
                specs[name] = spec
                continue
            specs[name] = TensorSpec(torch.float8_e4m3fn, spec.shape)
            blocks = tuple(-(-size // BLOCK) for size in spec.shape)
            specs[name + SCALE] = TensorSpec(torch.float32, blocks)
        return specs

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows; whole blocks are quantised, wherever the rows begin."""
        weight = name.removesuffix(SCALE)
        if weight not in self._shapes:
            return self.kept.read(name, rows)
        height = self._shapes[weight][0]
        if weight != name:
            blocks = rows or slice(0, -(-height // BLOCK))
            return _scales(self.exact.read(weight, slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, height))))
        chosen = rows or slice(0, height)
        first = chosen.start // BLOCK * BLOCK
        matrix = self.exact.read(weight, slice(first, min(-(-chosen.stop // BLOCK) * BLOCK, height)))
        return quantise(matrix)[0][chosen.start - first : chosen.stop - first]


def quantization_config(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What config.json says of the weights `specs` of an fp8 folder."""
    kept = [
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and name + SCALE not in specs
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted({*kept, "lm_head"}),
    }


def unaligned(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Matrices below which servers put another one, although their height is not a multiple of 128: the blocks of the
    joined matrix are not those of the two."""
    return [
        name
        for name, spec in specs.items()
        if name + SCALE in specs and name.split(".")[-2] in _FOLLOWED and spec.shape[0] % BLOCK
    ]


class Dequantised:
    """The tensors of an fp8 folder with its matrices in fp32 again. Raises CheckpointError for a matrix without its
    scales."""

    def __init__(self, source: TensorSource):
        self.source = source
        self._scaled: list[str] = []
        specs = source.specs()
        for name, spec in specs.items():
            if spec.dtype != torch.float8_e4m3fn:
                continue
            blocks = tuple(-(-size // BLOCK) for size in spec.shape)
            if name + SCALE not in specs or specs[name + SCALE].shape != blocks:
                raise CheckpointError(f"{name}: has no scales {list(blocks)}")
            self._scaled.append(name)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor but the scales."""
        return {
            name: TensorSpec(torch.float32, spec.shape) if name in self._scaled else spec
            for name, spec in self.source.specs().items()
            if name.removesuffix(SCALE) not in self._scaled or name in self._scaled
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows."""
        if name not in self._scaled:
            return self.source.read(name, rows)
        height = self.source.specs()[name].shape[0]
        chosen = rows or slice(0, height)
        first = chosen.start // BLOCK * BLOCK
        last = min(-(-chosen.stop // BLOCK) * BLOCK, height)
        scale = self.source.read(name + SCALE, slice(first // BLOCK, -(-last // BLOCK)))
        whole = dequantise(self.source.read(name, slice(first, last)), scale)
        return whole[chosen.start - first : chosen.stop - first]


def dequantised(folder: Path) -> TensorSource:
    """The tensors of a Hugging Face folder in fp8, dequantised."""
    return Dequantised(TensorFolder(folder))
