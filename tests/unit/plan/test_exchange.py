"""What the planner says of each dispatcher: bytes inside nodes and between them, time, and memory."""

from dataclasses import replace

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, resolve
from mythos_ds.costs.reach import places_reached
from mythos_ds.hardware import read_gpu
from mythos_ds.plan.activation_trace import Workload, trace
from mythos_ds.plan.exchange import exchanged
from mythos_ds.plan.timing import transfers
from mythos_ds.plan.traffic import traffic
from tests.helpers.toy_model import toy_model

LIMITED = ("model.n_expert_groups=32", "model.n_limited_groups=4")


FREE = ("model.n_expert_groups=null", "model.n_limited_groups=null", "parallel.overlap=false")
"""1t with any experts for a token, and without lanes."""


def run(name: str, *overrides: str) -> ResolvedRun:
    return resolve(load_config("1t", [f"parallel.dispatch={name}", *FREE, *overrides]).config, 1024)


def forwards(name: str, *overrides: str) -> tuple[float, float, float]:
    """Copies of a token that a forward sends to its node, to others, and both: by bytes, there and back."""
    resolved = run(name, *overrides)
    found = exchanged(resolved, 1, 0)
    model, training = resolved.config.model, resolved.config.training
    tokens = resolved.stages[0].rows * training.seq_len * resolved.gradient_accumulation_steps
    row = 2 * model.dim * 2 * tokens * model.recurrent_layers
    return found.node / row, found.network / row, found.total / row


@pytest.mark.parametrize(
    ("name", "overrides", "network"),
    [("all_to_all", (), 7.75), ("per_node", (), 6.97), ("per_node", LIMITED, 3.875), ("all_to_all", LIMITED, 7.75)],
)
def test_copies_between_nodes(name: str, overrides: tuple[str, ...], network: float) -> None:
    assert forwards(name, *overrides)[1] == pytest.approx(network, abs=0.01)


def test_copies_inside_a_node_and_in_all() -> None:
    node, network, total = forwards("all_to_all")
    assert (node, network, total) == pytest.approx((8 * 7 / 256, 7.75, 8))
    model = run("per_node").config.model
    node, _, total = forwards("per_node")
    ranks, nodes = places_reached(model, 256), places_reached(model, 32)
    assert (node, total) == pytest.approx((ranks * 7 / 8, ranks + nodes), rel=1e-3)  # and weights, 32 bytes a token
    node, network, total = forwards("per_rank")
    assert total == pytest.approx(ranks, rel=1e-3)
    assert network / total == pytest.approx(31 / 32)


@pytest.mark.parametrize(("checkpointing", "back"), [("none", 2), ("layer", 2), ("loop", 2 + 7 / 8)])
def test_a_recompute_repeats_the_way_out_only(checkpointing: str, back: float) -> None:
    """Eight looped layers on a process, of whose loop the last needs no results again."""
    resolved = run("per_rank", f"parallel.activation_checkpointing={checkpointing}")
    assert len(resolved.stages[0].part.recurrent) == 8
    out = 2 + (checkpointing != "none")
    once = exchanged(resolved, 1, 0).total
    weights = 2 * 4 * resolved.config.model.n_experts_per_tok
    row = 2 * 2 * places_reached(resolved.config.model, 256) * resolved.config.model.dim
    expected = once * ((out + back) * row + out * weights) / (2 * row + weights)
    assert exchanged(resolved, 1, 1).total == pytest.approx(expected)


@pytest.mark.parametrize(("ep_size", "same"), [(256, "per_node"), (8, "per_rank")])
def test_deepep_is_counted_as_what_sends_the_same(ep_size: int, same: str) -> None:
    found, expected = (exchanged(run(name, f"parallel.ep_size={ep_size}"), 8, 4) for name in ("deepep", same))
    assert found == expected


@pytest.mark.parametrize(("checkpointing", "trips"), [("none", 1), ("layer", 2), ("loop", 2)])
@pytest.mark.parametrize(
    ("name", "copies"), [("all_to_all", 8), ("per_rank", places_reached(run("auto").config.model, 256))]
)
def test_rows_in_eight_bits(checkpointing: str, trips: int, name: str, copies: float) -> None:
    """The way out in forward and recompute takes dim bytes and a scale of four for each copy; all else stays bf16."""
    mode = f"parallel.activation_checkpointing={checkpointing}"
    plain, in_fp8 = (exchanged(run(name, mode, *more), 1, 1) for more in ((), ("parallel.dispatch_dtype=fp8",)))
    resolved = run(name)
    model, stage = resolved.config.model, resolved.stages[0]
    calls = len(stage.part.recurrent) * resolved.gradient_accumulation_steps
    saved = stage.rows * resolved.config.training.seq_len * copies * calls * trips * (2 * model.dim - model.dim - 4)
    assert plain.total - in_fp8.total == pytest.approx(saved)
    assert plain.integers == in_fp8.integers


def test_links_work_one_after_the_other_by_node() -> None:
    gpu = read_gpu("h200")
    times = {}
    for name in ("all_to_all", "per_node"):
        (found,) = (t for t in transfers(run(name), 8, 4, gpu, 0) if t.name == "dispatch and combine")
        parts = found.node_bytes / gpu.node_bandwidth, found.network_bytes / gpu.network_bandwidth
        times[name] = found.seconds
        assert found.seconds == pytest.approx(sum(parts) if name == "per_node" else max(parts))
    assert times["per_node"] < times["all_to_all"]
    assert traffic(run("per_node"), 8).counts > traffic(run("all_to_all"), 8).counts


@pytest.mark.parametrize("checkpointing", ["none", "layer", "loop"])
def test_memory_of_a_step(checkpointing: str) -> None:
    """Of fewer copies: with eight experts of a token on four processes, half of all rows."""
    model = toy_model(n_experts=32, n_experts_per_tok=8, dim=64, expert_dim=8)
    load = Workload(model, 2, 64, 2, 4, torch.bfloat16, checkpointing, ranks_per_node=2)  # type: ignore[arg-type]
    peaks = {name: trace(replace(load, dispatch=name)).peak for name in ("all_to_all", "per_rank", "per_node")}
    assert peaks["per_rank"] < peaks["per_node"] < 1.5 * peaks["all_to_all"]
    assert peaks["per_rank"] > 0.4 * peaks["all_to_all"]
    in_fp8 = {name: trace(replace(load, dispatch=name, rows_in_fp8=True)).peak for name in peaks}
    assert all(0.9 * peak < in_fp8[name] < 1.1 * peak for name, peak in peaks.items())
    assert in_fp8["all_to_all"] != peaks["all_to_all"]
