"""Bytes of live tensors, counted as they come and go: the peak memory of a run on any device, also on `meta`."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While active, `now` is the bytes of the storages alive and `peak` the most there were.

    Counted are storages, once each, whatever number of tensors view them. What an operation allocates and frees inside
    itself is not seen. `added` are bytes that no tensor stands for, and `peak_without` the peak without them.
    """

    def __init__(self, *, existing: bool) -> None:
        """existing: also count the tensors that are there already."""
        super().__init__()
        self.now = self.peak = self.added = self.peak_without = 0
        self._known: dict[int, int] = {}
        if existing:
            for found in gc.get_objects():
                if isinstance(found, Tensor):
                    self._note(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def add(self, size: int) -> None:
        """Count bytes that no tensor stands for; negative ones take them back."""
        self.added += size
        self._grow(size)

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_without = max(self.peak_without, self.now - self.added)

    def ignore(self, *tensors: Tensor) -> None:
        """Leave these out from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.now -= self._known.get(storage._cdata, 0)
            self._watch(storage, 0)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in self._known:
            self._watch(storage, storage.nbytes())
            self._grow(storage.nbytes())

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            weakref.finalize(storage, self._forget, storage._cdata)
        self._known[storage._cdata] = size

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
