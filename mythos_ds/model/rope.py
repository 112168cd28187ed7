"""Rotary position embedding (Su et al. 2021) with real cos/sin, and its stretching to longer sequences.

The tables are computed from the positions in each forward: a frequency buffer would be cast to bf16 and lose its value
under DeepSpeed's `zero.Init`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_ds.config.schema import RopeScaling
from mythos_ds.errors import ConfigError
from mythos_ds.kernels.rope import rotate

_FAST, _SLOW = 32.0, 1.0
"""YaRN's turns within the original length, between which its two kinds of frequencies are mixed."""


@dataclass(frozen=True)
class Rotary:
    """The cos and sin tables, fp32 [batch or 1, seq, 1, width / 2], for one head width."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def at(
        cls, positions: Tensor, width: int, theta: float, interleaved: bool, scaling: RopeScaling | None = None
    ) -> "Rotary":
        """Computes the tables for integer positions [batch or 1, seq] and heads of `width` channels."""
        exponent = torch.arange(0, width, 2, device=positions.device).float() / width
        if scaling is None:
            angle = positions.float()[..., None, None] * torch.pow(torch.full_like(exponent, theta), -exponent)
            return cls(angle.cos(), angle.sin(), interleaved)
        angle = positions.float()[..., None, None] * scaled_frequencies(exponent, theta, scaling)
        factor = attention_factor(scaling)
        return cls(angle.cos() * factor, angle.sin() * factor, interleaved)

    def split(self, parts: int) -> list["Rotary"]:
        """The tables of equal parts of the sequences; they may share them all."""
        if len(self.cos) == 1:
            return [self] * parts
        tables = zip(self.cos.chunk(parts), self.sin.chunk(parts), strict=True)
        return [Rotary(cos, sin, self.interleaved) for cos, sin in tables]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates x [batch, seq, heads, width] by its positions; computed in fp32, returned in x's dtype."""
        return rotate(x, self.cos, self.sin, interleaved=self.interleaved)


def scaled_frequencies(exponent: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Computes angles per position, fp32 [width / 2], from the exponents 2i / width of heads that wide."""
    powers = theta**exponent
    frequency = 1.0 / powers
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "llama3":
        return _by_wavelength(frequency, scaling)
    return _by_turns(frequency, 1.0 / (scaling.factor * powers), theta, scaling)


def _by_wavelength(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: waves longer than original / low_freq_factor are divided by the factor, those shorter than original
    / high_freq_factor stay, and between the two the share that is divided falls linearly with the wave number."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    if original is None or low is None or high is None:
        raise ConfigError("model.rope_scaling: llama3 needs its two frequency factors and the original length")
    wavelength = 2 * math.pi / frequency
    kept = (original / wavelength - low) / (high - low)
    mixed = (1 - kept) * frequency / scaling.factor + kept * frequency
    slow = torch.where(wavelength > original / low, frequency / scaling.factor, mixed)
    return torch.where(wavelength < original / high, frequency, slow)


def _by_turns(frequency: Tensor, divided: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK by parts": waves that turn more than beta_fast times within the original length stay, those that turn
    less than beta_slow times are divided, in between both are mixed linearly by their index."""
    original = scaling.original_max_position_embeddings
    if original is None:
        raise ConfigError("model.rope_scaling: yarn needs original_max_position_embeddings")
    width = 2 * len(frequency)

    def index(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast or _FAST), index(scaling.beta_slow or _SLOW)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    ramp = (torch.arange(len(frequency), device=frequency.device).float() - first) / (last - first)
    kept = 1 - ramp.clamp(0, 1)
    return divided * (1 - kept) + frequency * kept


def attention_factor(scaling: RopeScaling) -> float:
    """The factor on rotated queries and keys, whose square scales the softmax's logits (YaRN, equation 22)."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = math.log(scaling.factor)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (0.1 * scaling.mscale * growth + 1.0) / (0.1 * scaling.mscale_all_dim * growth + 1.0)
    return 0.1 * growth + 1.0
