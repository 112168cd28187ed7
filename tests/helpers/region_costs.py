"""What compiled regions cost: kernels that the inductor makes of a graph, library calls, and bytes that both touch.

The graphs are those of the CPU back end, whose scheduler fuses as that of GPUs does; they are scheduled, never made
into machine code. A fused node is one kernel, a node left to torch's own operators one call.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, scheduler
from torch.utils._pytree import tree_leaves

from mythos_ds.kernels.regions import fix_widths, with_constants
from tests.helpers.region_calls import Call


@dataclass
class Cost:
    """Launches and bytes; add up with +."""

    kernels: int = 0
    calls: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.kernels + other.kernels, self.calls + other.calls, self.bytes + other.bytes)

    @property
    def launches(self) -> int:
        """Kernels and library calls."""
        return self.kernels + self.calls


@dataclass
class RegionCost:
    """The forward and backward graphs of one region at one kind of call."""

    forward: Cost = field(default_factory=Cost)
    backward: Cost = field(default_factory=Cost)


def cost_of_call(call: Call) -> RegionCost:
    """What a region's call costs, with arguments of that kind."""
    function = getattr(importlib.import_module(call.module), call.name).__wrapped__
    own = [_argument(kind) if isinstance(kind, tuple) else kind for kind in call.arguments]
    return region_cost(with_constants(function, dict(call.constants)), own, with_gradient=call.with_gradient)


def _argument(kind: tuple[tuple[int, ...], torch.dtype, bool]) -> Tensor:
    """A tensor whose memory is never touched."""
    shape, dtype, graded = kind
    made = torch.empty(shape, dtype=dtype)
    return nn.Parameter(made) if graded and len(shape) == 1 else made.requires_grad_(graded)


class _Scheduled(Exception):
    """The graph is scheduled: more is not needed."""


def _cost_of(own: Any) -> Cost:
    cost = Cost()
    for node in own.nodes:
        if not isinstance(node, scheduler.NopKernelSchedulerNode):
            external = isinstance(node, scheduler.ExternKernelSchedulerNode)
            cost += Cost(int(not external), int(external), node.get_read_write_buffers_sizes())
    return cost


def region_cost(function: Callable[..., Any], arguments: Sequence[Any], *, with_gradient: bool) -> RegionCost:
    """The cost of a function of CPU tensors, compiled as regions are but never run; `with_gradient`: under autograd,
    with a gradient of every output that has one."""
    found = RegionCost()
    costs = [Cost()]

    def count(own: Any) -> None:
        costs.append(_cost_of(own))
        raise _Scheduled

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        try:
            with patch.object(scheduler.Scheduler, "codegen", count):
                compile_fx.compile_fx_inner(graph, inputs, **options)
        except Exception as error:  # the inductor wraps what is raised inside
            if not _is_or_wraps(error, _Scheduled):
                raise
        if options.get("is_backward"):
            found.backward = costs[-1]
        else:
            found.forward = costs[-1]
        return _blank(graph)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    fix_widths(arguments)
    with torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1), torch.set_grad_enabled(with_gradient):
        out = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)(*arguments)
        leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            torch.autograd.backward(leaves, [torch.empty_like(x) for x in leaves])
    return found


def _blank(graph: Any) -> Callable[[list[Any]], Any]:
    """Results of the graph's shapes, which nobody computed or reads."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")

    def number(size: Any) -> Any:
        return size.node.hint if isinstance(size, torch.SymInt) else size

    def result(node: Any) -> Any:
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor):
            shape, strides = ([number(size) for size in sizes] for sizes in (value.shape, value.stride()))
            return torch.empty_strided(shape, strides, dtype=value.dtype)
        return number(value) if value is not None else node

    def call(arguments: list[Any]) -> Any:
        arguments.clear()
        return [result(node) for node in output.args[0]]

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _is_or_wraps(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return False
