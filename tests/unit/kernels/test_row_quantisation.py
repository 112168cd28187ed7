"""Rows in eight bits: what is read back, bit by bit."""

import pytest
import torch
from torch import Tensor

from mythos_ds.kernels.row_quantisation import SCALE_BYTES, dequantise_rows, quantise_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def drawn(dtype: torch.dtype, rows: int = 300, dim: int = 64) -> Tensor:
    """Rows of very different sizes, and numbers of different sizes in them."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(12 * torch.randn(rows, 1, generator=generator))
    return (sizes * torch.randn(rows, dim, generator=generator) ** 3).to(dtype)


def read_back(rows: Tensor) -> Tensor:
    return dequantise_rows(quantise_rows(rows), dtype=rows.dtype)


def nearest(rows: Tensor) -> Tensor:
    """By the formula: each number to the nearest of 448 * 2^s * {every e4m3 number} / 448, s the smallest that keeps
    the row's largest in range; ties to the even fraction."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 .. 448
    exact = rows.double()
    largest = exact.abs().amax(1, keepdim=True)
    exponent = torch.ceil(torch.log2(largest / 448))
    scaled = (exact.abs() / 2.0**exponent)[..., None]
    distance = (scaled - numbers).abs()
    even = torch.arange(127) % 2 == 1  # an odd fraction loses a tie
    chosen = (distance + 1e-12 * even).argmin(-1)
    return (exact.sign() * numbers[chosen] * 2.0**exponent).to(rows.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_becomes_the_nearest(dtype: torch.dtype) -> None:
    rows = drawn(dtype).float().to(dtype)
    assert torch.equal(read_back(rows), nearest(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_time_changes_nothing(dtype: torch.dtype) -> None:
    once = read_back(drawn(dtype))
    assert torch.equal(read_back(once), once)


def test_the_error_is_bounded() -> None:
    rows = drawn(torch.float32)
    error, largest = (read_back(rows) - rows).abs(), rows.abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(rows.abs() / 16, largest * 2.0**-17)).all()


def test_bytes_of_a_row() -> None:
    written = quantise_rows(drawn(torch.bfloat16, 5, 48))
    assert (written.dtype, tuple(written.shape)) == (torch.uint8, (5, 48 + SCALE_BYTES))


def test_rows_without_numbers_and_with_odd_ones() -> None:
    rows = torch.zeros(5, 8)
    rows[1, 2], rows[2, 3], rows[3, 4], rows[4] = float("inf"), float("nan"), -448.0, 1e-45
    found = read_back(rows)
    assert torch.equal(found[[0, 3]], rows[[0, 3]])
    assert found[[1, 2]].isnan().all(), "a loss that is not finite must be seen"
    assert torch.equal(found[4], torch.zeros(8)), "below what fp32 holds normally"
    assert read_back(rows[:0]).shape == (0, 8)
