"""Calls of compiled regions, by what their cost depends on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A region's call: its function, constants, and kinds of arguments. Two that are equal cost the same."""

    module: str
    name: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[Any, ...]
    """Of a tensor (shape, dtype, whether it has a gradient); else the argument."""
    with_gradient: bool


def described(function: Callable[..., Any], constants: dict[str, Any], arguments: Sequence[Any]) -> Call:
    """The call of a region with these constants and arguments."""
    on = torch.is_grad_enabled()
    kinds = [(tuple(x.shape), x.dtype, x.requires_grad and on) if isinstance(x, Tensor) else x for x in arguments]
    graded = any(isinstance(kind, tuple) and kind[2] for kind in kinds)
    return Call(function.__module__, function.__name__, tuple(constants.items()), tuple(kinds), graded)
