"""Regions: functions of tensors that the compiler may turn into few kernels.

A region is a function, never a module, as ZeRO-3 swaps the data of parameters while a module is at work. It runs as it
is written until `compile_regions` names a backend for the process; then it is compiled whole, without a graph break, at
its first call, for any number of rows. Whoever calls it does not know which.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Backend = str | Callable[..., Any]

RECOMPILE_LIMIT = 64
"""Variants of one region: by types, widths, one row or many, with and without gradient. torch's 8 are too few for the
norm, which all layers share; they stay far below this limit, whatever the numbers of rows and loops."""


class _Compiler:
    """What this process compiles regions with; None: they run as they are written. `caller` stands in for both."""

    backend: Backend | None = None
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
    caller: Callable[..., Any] | None = None


def compile_regions(backend: Backend | None) -> None:
    """Let this process compile its regions with a backend of torch.compile, "inductor" for speed; None: run them as
    they are written."""
    _Compiler.backend = backend
    _Compiler.compiled.clear()


@contextmanager
def regions_called_by(caller: Callable[..., Any]) -> Iterator[None]:
    """Let caller(function, tensors, constants) run this process's regions meanwhile: who counts what they cost, and how
    often they are called, gives their results."""
    before, _Compiler.caller = _Compiler.caller, caller
    try:
        yield
    finally:
        _Compiler.caller = before


@functools.cache
def _limits() -> dict[str, int]:
    """The limit of variants as an option of torch.compile, where this torch has it: a setting would be this thread's
    alone, and of a GPU's work the backward, recomputes included, runs in another."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILE_LIMIT}
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return {}


def _is_watched(tensors: tuple[Any, ...]) -> bool:
    """Whether operators are counted or only imagined, by a mode of dispatch or on the meta device: a compiled region
    would hide them, or not compile at all."""
    first = tensors[0] if tensors else None
    return is_in_torch_dispatch_mode() or (isinstance(first, torch.Tensor) and first.is_meta)


def region(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function of tensors, [rows], [rows, width], [batch, seq, width] or [batch, seq, heads, width]. Keyword
    arguments are constants: each combination is compiled by itself."""

    @functools.wraps(function)
    def call(*tensors: Any, **constants: Any) -> Any:
        if _Compiler.caller is not None:
            return _Compiler.caller(function, tensors, constants)
        if _Compiler.backend is None or _is_watched(tensors):
            return function(*tensors, **constants)
        key = (function, *constants.items())
        compiled = _Compiler.compiled.get(key)
        if compiled is None:
            own = with_constants(cast(FunctionType, function), constants)
            options: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": _Compiler.backend}
            compiling: Any = torch.compile
            compiled = compiling(own, **options, **_limits())
            _Compiler.compiled[key] = compiled
        fix_widths(tensors)
        return compiled(*tensors)

    return cast(Callable[Arguments, Result], call)


def fix_widths(tensors: Iterable[Any]) -> None:
    """Let the compiler take all but the first dimension or two for constants, where there are several: rows vary, and
    of known widths kernels read and write several numbers at once."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
            torch._dynamo.mark_static(tensor, list(range(min(2, tensor.dim() - 1), tensor.dim())))


def with_constants(function: FunctionType, constants: dict[str, Any]) -> FunctionType:
    """The function with constants as its defaults, which the compiler takes for constants; numbers in a call it would
    take for variables. Its code is a copy, by which compiled variants are kept and counted."""
    code = function.__code__
    own = FunctionType(code.replace(co_name=f"{code.co_name}_region"), function.__globals__, function.__name__)
    own.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **constants}
    own.__defaults__ = function.__defaults__
    return own


def compiler_problem(device: torch.device) -> str | None:
    """Says in a line why nothing can be compiled for the device: no Triton, no C++ compiler, or one that fails. Tries
    the smallest function, which takes seconds the first time."""
    # A function of its own each time: what was compiled once is not tried again.
    own = with_constants(cast(FunctionType, _trial), {})
    try:
        torch.compile(own, fullgraph=True, backend="inductor")(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler, its cache or its libraries raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x + 1
