"""Where the code that runs on a GPU lets the host wait for it, as a list: every wait empties the queue of kernels.

What can be told from the source alone: calls that bring values to the host, results whose size depends on values, and
reductions used as a number or a truth. On fake CUDA tensors tests/cuda holds the model to none at all.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_ds.config.schema import IGNORED_LABEL
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.pipeline_stopwatch import Stopwatch
from tests.helpers.paths import ROOT
from tests.helpers.toy_model import toy_config

PACKAGES = ("model", "kernels", "parallel")

TO_HOST = {"item", "tolist", "cpu", "numpy", "synchronize"}
SIZED_BY_VALUES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
REDUCTIONS = {
    "sum",
    "mean",
    "norm",
    "max",
    "min",
    "amax",
    "amin",
    "any",
    "all",
    "equal",
    "count_nonzero",
    "allclose",
    "all_reduce",
}
CASTS = {"int", "float", "bool"}

ALLOWED: dict[tuple[str, str], tuple[int, str]] = {
    ("kernels/segments.py", "from_positions"): (6, "on the CPU, where a batch's positions stay until they are read"),
    ("model/feed_forward.py", "forward"): (1, "looped experts alone: where no grouped product is fused"),
    ("model/mythos.py", "_counted"): (1, "targets that do not count, once per micro-batch: as many rows as do"),
    ("parallel/dispatch_all_to_all.py", "_agree"): (
        1,
        "a row exchange takes its sizes from the host; not in recomputes",
    ),
    ("parallel/dispatch_per_node.py", "_agree"): (1, "the same, of both hops at once"),
    ("parallel/dispatch_per_rank.py", "_agree"): (1, "the same, of one hop"),
    ("parallel/groups.py", "any"): (1, "of a number on the host"),
    ("parallel/groups.py", "agree"): (1, "numbers of the host, between steps; they never were on the device"),
    ("parallel/pipeline_stopwatch.py", "idle_share"): (1, "after a step's last kernel, and nowhere else"),
    ("parallel/routing_stats.py", "largest_bias"): (1, "once per step, after it"),
    ("parallel/routing_stats.py", "reduce"): (1, "once per step, after it: all statistics in one copy"),
    ("parallel/routing_stats.py", "statistics"): (8, "on the CPU, to which reduce has brought them"),
}
"""(file, function): the number of waits, and why each is there."""


def waits(source: str) -> Counter[str]:
    """Waits by function; those of a nested function count for it alone."""
    found: Counter[str] = Counter()
    _visit(ast.parse(source), "<module>", set(), found)
    return found


def _visit(node: ast.AST, function: str, masks: set[str], found: Counter[str]) -> None:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function, masks = node.name, set(_masks(node))
    found[function] += _waits_at(node, masks)
    for child in ast.iter_child_nodes(node):
        _visit(child, function, masks, found)
    if not found[function]:
        del found[function]


def _masks(function: ast.AST) -> Iterator[str]:
    """Names that are bound to a comparison: of tensors, a mask."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Compare):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _waits_at(node: ast.AST, masks: set[str]) -> int:
    if isinstance(node, ast.Call):
        return _is_wait(node)
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return _truths(node.test)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return sum(isinstance(index, ast.Name) and index.id in masks for index in indices)
    return 0


def _is_wait(call: ast.Call) -> int:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name in TO_HOST or name in SIZED_BY_VALUES:
        return 1
    if name == "where":
        return len(call.args) + len(call.keywords) == 1
    if name == "repeat_interleave":
        return not any(keyword.arg == "output_size" for keyword in call.keywords)
    if isinstance(call.func, ast.Name) and call.func.id in CASTS and call.args:
        return _is_reduction(call.args[0])
    return 0


def _truths(test: ast.expr) -> int:
    """Reductions that are asked whether they are true, by themselves or in a comparison."""
    if isinstance(test, ast.BoolOp):
        return sum(map(_truths, test.values))
    if isinstance(test, ast.UnaryOp):
        return _truths(test.operand)
    if isinstance(test, ast.Compare):
        return any(map(_is_reduction, [test.left, *test.comparators]))
    return _is_reduction(test)


def _is_reduction(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS


def found_in_packages() -> dict[tuple[str, str], int]:
    """Waits by file and function."""
    found: dict[tuple[str, str], int] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / "mythos_ds" / package).rglob("*.py")):
            file = path.relative_to(ROOT / "mythos_ds").as_posix()
            found |= {(file, function): count for function, count in waits(path.read_text()).items()}
    return found


def test_every_wait_has_a_reason() -> None:
    """More waits than listed are new; fewer mean that the list is old."""
    found = found_in_packages()
    listed = {place: count for place, (count, _) in ALLOWED.items()}
    assert found == listed
    assert all(len(reason) > 10 for _, reason in ALLOWED.values())


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("x.item()", 1),
        ("[y.tolist() for y in x]", 1),
        ("x.detach().cpu().numpy()", 2),
        ("torch.nonzero(x)", 1),
        ("x.unique(return_counts=True)", 1),
        ("torch.where(x > 0)", 1),
        ("torch.where(x > 0, x, y)", 0),
        ("x.repeat_interleave(counts)", 1),
        ("x.repeat_interleave(counts, output_size=n)", 0),
        ("int(x.sum())", 1),
        ("int('3')", 0),
        ("float(torch.norm(x))", 1),
        ("bool(x.any())", 1),
        ("y if x.any() else z", 1),
        ("assert not x.isfinite().all()", 1),
        ("if a and (x.min() < 1 or x.max() > 3): pass", 0 + 2),
        ("if any(x): pass", 0),
        ("mask = x != 3; y = x[mask]; x[mask] = 0", 1),
        ("rows = 3; y = x[rows]", 0),
    ],
)
def test_what_counts(line: str, count: int) -> None:
    body = "\n".join(f"    {part.strip()}" for part in line.split(";"))
    assert waits(f"def outer():\n    pass\n\n\ndef f(x):\n{body}\n") == Counter({"f": count} if count else {})


class Operators(TorchDispatchMode):
    """Notes the operators that ran, those that index by a mask apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        name = func.overloadpacket.__name__
        self.names["index by mask" if name == "index" and masks else name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("argument", ["labels", "targets"])
def test_targets_that_do_not_count_cost_one_wait(argument: str) -> None:
    config = toy_config()
    tokens = torch.arange(12).view(2, 6)
    masked = tokens.masked_fill(tokens % 3 == 0, IGNORED_LABEL)
    with torch.no_grad(), Operators() as ran:
        options: dict[str, Any] = {"loss_divisor": 3.0} if argument == "targets" else {}
        MythosModel(config)(tokens, n_loops=1, **{argument: masked}, **options)
    assert ran.names["nonzero"] == 1
    assert ran.names["index by mask"] == 0


def test_bounds_are_read_on_the_cpu_whatever_the_device() -> None:
    """The meta device has no values to wait for."""
    groups: Any = SimpleNamespace(device=torch.device("meta"))
    batch = {"tokens": torch.zeros(1, 8, dtype=torch.int64), "positions": torch.arange(8)[None] % 5}
    moved = TrainingEngine._on_device(cast(TrainingEngine, SimpleNamespace(groups=groups)), batch)
    assert moved["tokens"].is_meta
    with torch.device("meta"):
        model = MythosModel(toy_config())
    context = model.make_context(moved["tokens"], moved["positions"], None, 1)
    assert context.documents is not None
    assert context.documents.runs == ((1, 3), (1, 5))
    assert context.documents.cu_seqlens.is_meta
    assert context.documents.order.is_meta
    assert context.rotary.cos.is_meta


def test_the_clock_of_a_pipeline_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Each second an event; the last one made is the one that is waited for."""

        made: ClassVar[list[Any]] = []
        waited: ClassVar[list[Any]] = []

        def __init__(self, enable_timing: bool):
            self.time = float(len(self.made))
            self.made.append(self)

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            self.waited.append(self)

        def elapsed_time(self, end: Any) -> float:
            return 1000.0 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with clock.busy():
            pass
    clock.finish()
    assert Event.waited == []
    assert clock.idle_share() == pytest.approx(1 - 3 / 7)
    assert Event.waited == [Event.made[-1]]
