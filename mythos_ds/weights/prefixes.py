"""Weights whose names all carry what a wrapper put before them: DistributedDataParallel, torch.compile, a trainer."""

from torch import Tensor

from mythos_ds.errors import CheckpointError
from mythos_ds.weights.reader import TensorSource, TensorSpec

_COMPILED = "_orig_mod."
_WRAPPERS = {"module", "model"}
_HEAD = "lm_head."


class Renamed:
    """The tensors of a source under other names; those without one keep theirs."""

    def __init__(self, source: TensorSource, names: dict[str, str]):
        self.source, self.names = source, names

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, by its new name."""
        given = self.source.specs()
        return {new: given[old] for new, old in self.names.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows."""
        return self.source.read(self.names[name], rows)


def without_prefix(source: TensorSource, anchor: str) -> TensorSource:
    """The tensors under names in which the embedding is `anchor`: what wrappers put before all names goes, and what a
    model without its head lacks ("model.", where `anchor` has it) is put there. Raises CheckpointError where not all
    names begin alike, or two become one."""
    last = anchor.rsplit("model.", 1)[-1]
    inner = anchor.removesuffix(last)
    # torch.compile also marks single modules, in the middle of a name.
    names = {name: name.replace(_COMPILED, "") for name in source.specs()}
    found = sorted((name for name in names.values() if name == last or name.endswith(f".{last}")), key=len)
    if not found:
        return source
    before = found[0].removesuffix(last)
    whole = before.endswith(inner)
    prefix = before.removesuffix(inner) if whole else before
    unknown = [part for part in prefix.split(".") if part and part not in _WRAPPERS]
    odd = [name for name, new in names.items() if not new.startswith(prefix)]
    if unknown or odd:
        return source  # its names are refused one by one
    put = "" if whole else inner
    renamed: dict[str, str] = {}
    for name, new in names.items():
        own = new.removeprefix(prefix)
        own = own if own.startswith(_HEAD) else put + own
        if own in renamed:
            raise CheckpointError(f"{name}: is, without its prefix, the same as {renamed[own]}")
        renamed[own] = name
    return source if all(new == old for new, old in renamed.items()) else Renamed(source, renamed)
