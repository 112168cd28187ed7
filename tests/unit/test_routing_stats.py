"""Sums of a step's notes: all layers and loops at once give what one addition after the other does."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.parallel.routing_stats import StepRecords, largest_bias, update_biases
from tests.helpers.toy_model import randomise, toy_batch, toy_config

LOOPS = 5
VIEWS = {"view", "slice", "select", "unbind", "alias", "detach"}


class Launches(TorchDispatchMode):
    """Counts operators that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def notes(depths: list[int] | None, details: bool) -> list[ForwardRecords]:
    """The notes of two micro-batches of a drawn model."""
    config = toy_config()
    model = randomise(MythosModel(config))
    taken = []
    for seed in (1, 2):
        records = ForwardRecords(details=details)
        own = None if depths is None else torch.tensor(depths)
        with torch.no_grad():
            batch = toy_batch(config, seed=seed)
            model(**batch, n_loops=LOOPS, aux=AuxLoss(0.1, 0.1), records=records, depths=own)
        taken.append(records)
    return taken


def one_by_one(step: StepRecords, taken: list[ForwardRecords]) -> dict[str, Tensor]:
    """The sums, each note added by itself."""
    sums = {name: torch.zeros_like(value) for name, value in step.sums.items()}
    for records in taken:
        depths = records.depths
        begun = [1.0 if depths is None else depths.begun(loop).double().mean().item() for loop in range(LOOPS)]
        sums["begun"] += torch.tensor(begun, dtype=torch.float64)
        for layer, by_loop in records.routing.items():
            for loop, note in by_loop.items():
                for name in ("counts", "prebias_counts"):
                    counts = getattr(note, name)
                    if counts is not None:
                        sums[name][layer, loop if counts.dim() == 1 else slice(None)] += counts
                for field in step.fields:
                    value = getattr(note, field)
                    if value is not None:
                        part = begun[loop - 1 if field == "overlap_previous" else loop]
                        sums[field][loop] += value.double() / step.layers * part
        for loop, state in records.loops.items():
            sums["state_rms"][loop] += state.state_rms.double() * begun[loop]
            sums["residual"][loop] += state.residual.double() * begun[loop]
        if records.decay_maximum is not None:
            sums["rho_A"] += records.decay_maximum
    return sums


@pytest.mark.parametrize("details", [True, False])
@pytest.mark.parametrize("depths", [None, [1, 3, 5]], ids=["one depth", "a depth per sequence"])
def test_sums_are_those_of_one_note_after_the_other(depths: list[int] | None, details: bool) -> None:
    step = StepRecords(toy_config(), LOOPS, details=details, auxiliary=True, device=torch.device("cpu"))
    taken = notes(depths, details)
    want = one_by_one(step, taken)
    for records in taken:
        step.add(records)
    assert step.sums.keys() == want.keys()
    for name, value in step.sums.items():
        assert value.any(), name
        exact = name in ("counts", "prebias_counts")
        torch.testing.assert_close(value, want[name], rtol=0 if exact else 1e-14, atol=0, msg=name)


@pytest.mark.parametrize("details", [True, False])
def test_launches_do_not_grow_with_layers_and_loops(details: bool) -> None:
    """All notes are stacked before anything is done to them."""
    config = toy_config(recurrent_layers=4)
    model, ran = randomise(MythosModel(config)), []
    for n_loops in (2, 6):
        records = ForwardRecords(details=details)
        step = StepRecords(config, n_loops, details=details, auxiliary=True, device=torch.device("cpu"))
        with torch.no_grad():
            model(**toy_batch(config), n_loops=n_loops, aux=AuxLoss(0.1, 0.1), records=records)
            with Launches() as launches:
                step.add(records)
        ran.append(launches.number)
    assert ran[0] == ran[1] <= (40 if details else 15)


def test_statistics_of_one_process() -> None:
    """Reduced over a group of one; the biases move by the counts, and lie on the routers' device."""
    config = toy_config()
    step = StepRecords(config, LOOPS, details=True, auxiliary=True, device=torch.device("cpu"))
    for records in notes(None, details=True):
        step.add(records)
    groups: Any = SimpleNamespace(all_reduce=lambda tensor: tensor, world_size=1)
    step.reduce(cast(ParallelGroups, groups))
    assert step.counts.sum() == 2 * 60 * config.n_experts_per_tok * LOOPS * config.recurrent_layers
    assert all(value.device.type == "cpu" for value in step.sums.values())
    statistics = step.statistics(n_ranks=1)
    assert len(cast(list[float], statistics["router/entropy_per_loop"])) == LOOPS
    layers = MythosModel(config).moe_layers()
    assert largest_bias(layers) == largest_bias([]) == 0
    update_biases(layers, step.counts, 0.01)
    assert largest_bias(layers) == pytest.approx(0.01)
