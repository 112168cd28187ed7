"""Counts the bytes handed to torch.distributed."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor


def _bytes(tensors: Tensor | list[Tensor]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


class CollectiveBytes:
    """Bytes per collective on this rank. Must exist before DeepSpeed starts: its backend keeps the functions it finds.

    all_gather*: output bytes; all_to_all_single, reduce_scatter_tensor, all_reduce, isend: input bytes; integers
    (counts) apart from rows, whose eight bits are uint8.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._wrap("all_gather_into_tensor", 0, "output_tensor")
        self._wrap("all_gather", 0, "tensor_list")
        self._wrap("all_to_all_single", 1, "input")
        self._wrap("reduce_scatter_tensor", 1, "input")
        self._wrap("all_reduce", 0, "tensor")
        self._wrap("isend", 0, "tensor")

    def _wrap(self, name: str, position: int, keyword: str) -> None:
        original: Callable[..., Any] = getattr(torch_distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = args[position] if len(args) > position else kwargs[keyword]
            integers = isinstance(tensors, Tensor) and tensors.dtype in (torch.int32, torch.int64)
            self.bytes[f"{name}:integers" if integers else name] += _bytes(tensors)
            return original(*args, **kwargs)

        setattr(torch_distributed, name, counted)

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted = dict(self.bytes)
        self.bytes.clear()
        return counted
