"""Memory of a step that recomputes each layer instead of each loop, as the planner counts it."""

from dataclasses import replace
from math import prod

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.config.schema import ActivationCheckpointing
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.plan import activation_trace
from mythos_ds.plan.activation_trace import Trace, Workload, trace, visit_bytes
from mythos_ds.plan.layouts import with_changes
from mythos_ds.plan.memory import memory, parameter_shapes, saved_state_bytes, workload
from tests.helpers.toy_model import toy_model

TOY = Workload(toy_model(recurrent_layers=4), 2, 32, 3, 2, torch.bfloat16, "layer")
STATE = 2 * 32 * TOY.model.dim * 4
ROUTING = 8 * (5 * 2 * 32 * TOY.model.n_experts_per_tok + TOY.model.n_experts)
"""A token's experts, the order of its rows here and where they arrive, the inverses, and the counts."""


def traced(load: Workload, unit: ActivationCheckpointing) -> Trace:
    return trace(replace(load, checkpointing=unit))


def test_a_longer_loop_costs_a_state_and_a_routing_for_each_layer() -> None:
    three, four, nine = (trace(replace(TOY, grad_loops=loops)).peak for loops in (3, 4, 9))
    assert nine - four == 5 * (four - three)
    assert four - three == pytest.approx(4 * (STATE + ROUTING), rel=0.1)


def test_a_recompute_holds_one_layer_however_many_there_are() -> None:
    """But for what each of them keeps, a state and its routing, and the sums of its gradients over loops."""
    more = replace(TOY, model=toy_model(recurrent_layers=8))
    by_layer, by_loop = (
        traced(more, unit).without_weights - traced(TOY, unit).without_weights for unit in ("layer", "loop")
    )
    shapes = parameter_shapes(TOY.model)
    numbers = sum(
        prod(shape) // (TOY.ep_size if is_expert(name) else 1) for name, shape in shapes if ".layers.0." in name
    )
    assert by_layer <= 4 * (TOY.grad_loops * (STATE + ROUTING) + 4 * numbers) < by_loop


def test_all_loops_traced_one_by_one_come_to_the_same() -> None:
    """The trace of long loops is a line through those of two and three."""
    load = replace(TOY, grad_loops=7)
    assert trace(load) == activation_trace._run(load, 7)


@pytest.mark.parametrize("unit", ["none", "layer", "loop"])
def test_visits_that_wait_keep_the_inputs_of_their_layers(unit: ActivationCheckpointing) -> None:
    """Apart from that of the first, which is the message; by loop, that is all."""
    load = replace(TOY, checkpointing=unit)
    one, two, five = (visit_bytes(load, (0, 1, 2), waiting) for waiting in (1, 2, 5))
    assert five - one == 4 * (two - one)
    states = {"none": 20, "layer": 2, "loop": 0}[unit]
    kept = two - one
    if unit == "none":
        assert kept > states * STATE
    else:
        assert kept == pytest.approx(states * STATE + 3 * ROUTING, rel=0.02)


@pytest.mark.parametrize(("preset", "saved"), [("100b", 10e9), pytest.param("1t", 26e9, marks=pytest.mark.slow)])
def test_large_presets_hold_far_less(preset: str, saved: float) -> None:
    """The planner's items are the trace's own numbers."""
    config = load_config(preset).config
    found = {}
    for unit in ("loop", "layer"):
        run = resolve(with_changes(config, {"parallel.activation_checkpointing": unit}), planned_world_size(config))
        items = {item.name: item.bytes for item in memory(run).items}
        assert items["states"] == saved_state_bytes(workload(run))
        found[unit] = items["states"] + items["activations"]
        assert found[unit] == trace(workload(run)).without_weights
    assert found["loop"] - found["layer"] >= saved
