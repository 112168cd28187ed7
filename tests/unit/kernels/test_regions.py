"""Regions: compiled whole, with the results they have as written, and for any number of rows and loops at once."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mythos_ds.config.schema import TrainingConfig
from mythos_ds.engine import compilation
from mythos_ds.engine.compilation import end_compilation, set_up_compilation
from mythos_ds.kernels import regions
from mythos_ds.kernels.norm import add_rms_norm, rms_norm
from mythos_ds.kernels.regions import compile_regions, region
from mythos_ds.kernels.swiglu import swiglu
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from tests.helpers.listener import listening
from tests.helpers.toy_model import MLA, gradient, randomise, toy_config

GROUPS = SimpleNamespace(device=torch.device("cpu"), rank=0, any=bool)
TRAINING: dict[str, Any] = {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3, "max_steps": 1}


class Graphs:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.number += 1
        own: Callable[..., Any] = graph.forward
        return own


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """Regions compiled by a counting backend during the test."""
    counting = Graphs()
    torch._dynamo.reset()
    compile_regions(counting)
    yield counting
    compile_regions(None)


def test_a_region_runs_as_written_until_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert torch.equal(swiglu(torch.ones(2), torch.ones(2)), torch.nn.functional.silu(torch.ones(2)))


def test_other_rows_and_widths_stay_within_few_graphs(graphs: Graphs) -> None:
    """One graph for a width, whatever the number of rows; another for another constant."""
    weight = torch.ones(6)
    for rows in (2, 3, 7, 50):
        x = torch.randn(rows, 6)
        assert torch.equal(rms_norm(x, weight, eps=1e-5), rms_norm.__wrapped__(x, weight, eps=1e-5))  # type: ignore[attr-defined]
    assert graphs.number == 1
    rms_norm(x, weight, eps=1e-3)
    assert graphs.number == 2
    assert not torch.equal(rms_norm(x, weight, eps=1e-3), rms_norm(x, weight, eps=1e-5)), "constants are kept apart"
    total, normed = add_rms_norm(x, x, weight, eps=1e-5)
    assert torch.equal(normed, rms_norm(total, weight, eps=1e-5))
    assert graphs.number == 3


def test_a_graph_break_is_an_error(graphs: Graphs) -> None:
    @region
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        broken(torch.ones(2))
    assert graphs.number == 0


def _step(model: MythosModel, n_loops: int, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = (torch.arange(3 * rows) * 7 % 40).view(3, rows)
    records = ForwardRecords(details=True)
    loss = model(tokens, n_loops=n_loops, n_grad_loops=2, targets=tokens, aux=AuxLoss(0.1, 0.1), records=records)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: gradient(parameter) for name, parameter in model.named_parameters()}


def test_the_model_compiles_whole_and_random_depth_adds_no_graph(graphs: Graphs) -> None:
    """With loops recomputed in backward; the graphs are run as they are, so the numbers are those as written."""
    model = randomise(MythosModel(toy_config(**MLA, recurrent_layers=1), activation_checkpointing="loop"))
    for n_loops, rows in ((4, 9), (2, 14), (5, 11)):
        _step(model, n_loops, rows)
    before = graphs.number
    for n_loops, rows in ((6, 20), (3, 7), (7, 16)):
        loss, gradients = _step(model, n_loops, rows)
    assert graphs.number == before < 60
    compile_regions(None)
    wanted, plain = _step(model, n_loops, rows)
    assert torch.equal(loss, wanted)
    for name, value in plain.items():
        assert torch.equal(gradients[name], value), name


@pytest.mark.parametrize("compiles", [None, "regions", "none"])
def test_a_run_compiles_where_it_should(compiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    groups: Any = GROUPS
    try:
        set_up_compilation(TrainingConfig(**TRAINING, compile=compiles), groups)
        assert regions._Compiler.backend == ("inductor" if compiles == "regions" else None)
    finally:
        compile_regions(None)


@pytest.mark.parametrize("mine", [True, False])
def test_without_a_compiler_a_run_says_so_once_and_runs_as_written(mine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this rank, or on another one."""

    def compiled(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No C++ compiler\nmore lines")

    if mine:
        monkeypatch.setattr(torch, "compile", compiled)
    else:
        monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    training = TrainingConfig(**TRAINING, compile="regions")
    with listening(compilation.__name__) as heard:
        for rank in (0, 1):
            groups: Any = SimpleNamespace(device=torch.device("cpu"), rank=rank, any=lambda flag: True)
            set_up_compilation(training, groups)
            assert regions._Compiler.backend is None
    (said,) = heard
    assert ("RuntimeError: No C++ compiler" if mine else "on another rank") in said
    assert "more lines" not in said


def test_another_thread_has_as_many_variants(graphs: Graphs) -> None:
    """A GPU's backward runs in a thread of its own, where settings of the main thread do not hold."""
    weight, raised = torch.ones(6), []

    def run(count: int) -> None:
        try:
            for number in range(count):
                rms_norm(torch.randn(2, 6 + number), torch.ones(6 + number), eps=1e-5)
        except Exception as error:
            raised.append(error)

    run(9)
    thread = threading.Thread(target=run, args=(12,))
    thread.start()
    thread.join()
    assert raised == []
    assert torch.isfinite(rms_norm(torch.ones(3, 6), weight, eps=1e-5)).all()


def test_what_is_counted_or_only_imagined_runs_as_written(graphs: Graphs) -> None:
    meta = torch.empty(3, 6, device="meta")
    assert rms_norm(meta, torch.empty(6, device="meta"), eps=1e-5).is_meta
    with FlopCounterMode(display=False):
        rms_norm(torch.ones(3, 6), torch.ones(6), eps=1e-5)
    assert graphs.number == 0


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    groups: Any = SimpleNamespace(device=torch.device("cuda"), rank=0, any=bool)
    before = torch.get_float32_matmul_precision()
    set_up_compilation(TrainingConfig(**TRAINING, dtype="bfloat16"), groups)
    assert (regions._Compiler.backend, torch.get_float32_matmul_precision()) == ("inductor", "high")
    set_up_compilation(TrainingConfig(**TRAINING, dtype="float32"), groups)
    end_compilation()
    assert (regions._Compiler.backend, torch.get_float32_matmul_precision()) == (None, before)
