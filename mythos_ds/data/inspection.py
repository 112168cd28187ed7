"""What is inside an indexed dataset: lengths, boundaries, text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_ds.data.dataset_info import DatasetInfo, read_info
from mythos_ds.data.megatron import open_tokens
from mythos_ds.data.token_files import pair_faults
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import DamagedDatasetError, DataError


@dataclass(frozen=True)
class LengthBin:
    """Documents with low <= tokens < high."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Boundaries:
    """How the document ends look in a scan of the token file."""

    documents: int
    without_end: int
    """Documents whose last token is no end-of-document id."""
    with_inner_end: int
    """Documents that hold such an id before their last token."""
    largest_id: int

    @property
    def sound(self) -> bool:
        """Whether every document ends with the id and has it nowhere else."""
        return not (self.without_end or self.with_inner_end)


class DatasetView:
    """Read access to one dataset. Raises DataError where it is incomplete."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.info: DatasetInfo = read_info(prefix)
        for fault in pair_faults(prefix, self.info, full=False):
            raise DamagedDatasetError(f"{fault}; prepare the data again")
        self._tokens = open_tokens(prefix)
        self.lengths: NDArray[np.int64] = np.asarray(self._tokens.sequence_lengths, dtype=np.int64)
        """Tokens of each document, its end included [documents]."""

    @property
    def dtype(self) -> str:
        """Type of a stored token."""
        return str(np.dtype(self._tokens.index.dtype))

    def document(self, number: int) -> NDArray[Any]:
        """Token ids of one document [length]."""
        if not 0 <= number < len(self.lengths):
            raise DataError(f"document {number} given; allowed: 0 .. {len(self.lengths) - 1}")
        return np.asarray(self._tokens[number])

    def text(self, number: int, tokenizer: Tokenizer, *, limit: int | None = None) -> str:
        """The text of one document's first `limit` tokens. Raises DataError for a tokenizer of other data."""
        if tokenizer.sha256 != self.info.tokenizer_sha256:
            raise DataError(f"{tokenizer.path} is not the tokenizer that {self.prefix} was made with", code="MDS412")
        return tokenizer.decode(self.document(number)[:limit].tolist())

    def boundaries(self) -> Boundaries:
        """Scan all tokens."""
        eos, missing, inner, largest = self.info.eos_id, 0, 0, 0
        for number in range(len(self.lengths)):
            document = self.document(number)
            missing += int(document[-1] != eos)
            inner += int((document[:-1] == eos).any())
            largest = max(largest, int(document.max()))
        return Boundaries(len(self.lengths), missing, inner, largest)


def length_histogram(lengths: NDArray[np.int64]) -> list[LengthBin]:
    """Documents and tokens in bins bounded by powers of two, from the shortest to the longest document."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    bins = []
    for exponent in range(int(exponents.min()), int(exponents.max()) + 1):
        inside = lengths[exponents == exponent]
        bins.append(LengthBin(1 << exponent, 2 << exponent, len(inside), int(inside.sum())))
    return bins


def save_histogram(bins: list[LengthBin], path: Path, title: str) -> None:
    """Draw the histogram as an image. Raises DataError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("a histogram image needs matplotlib: pip install 'mythos_ds[dev]'", code="MDS004") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(bins))
    axes.bar([place - 0.2 for place in places], _shares([b.documents for b in bins]), 0.4, label="documents")
    axes.bar([place + 0.2 for place in places], _shares([b.tokens for b in bins]), 0.4, label="tokens")
    axes.set_xticks(list(places), [str(b.low) for b in bins])
    axes.set(xlabel="document length from (tokens, up to twice that)", ylabel="share (%)", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _shares(counts: list[int]) -> list[float]:
    return [100 * count / max(1, sum(counts)) for count in counts]
