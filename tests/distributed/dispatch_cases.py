"""What runs inside the processes of test_dispatch.py."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.bench.collective_bytes import CollectiveBytes
from mythos_ds.config.dispatch import DispatchChoice
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError
from mythos_ds.kernels.row_quantisation import dequantise_rows, quantise_rows
from mythos_ds.model.dispatch import Dispatcher, LocalDispatcher
from mythos_ds.model.feed_forward import Experts
from mythos_ds.model.initializer import Initializer
from mythos_ds.parallel.dispatch_all_to_all import AllToAllDispatcher
from mythos_ds.parallel.dispatch_per_node import PerNodeDispatcher
from mythos_ds.parallel.dispatch_per_rank import PerRankDispatcher
from mythos_ds.parallel.groups import ParallelGroups, init_parallel, require_expert_group
from tests.distributed.cases import layouts, opened, own_batches
from tests.distributed.communication_cases import expert_counts

DIM, HIDDEN, EXPERTS, NODE = 16, 12, 8, 2
NAMES = ("all_to_all", "per_rank", "per_node")
FP8 = " in fp8"
"""Follows the name of a dispatcher whose rows leave in eight bits."""


def everything(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tests of four ranks read, in one launch: two pretended nodes of two."""
    traffic = CollectiveBytes()
    groups = grouped(4, "per_node")
    dispatchers, in_fp8 = made(groups), {name + FP8: each for name, each in made(groups, in_fp8=True).items()}
    both = {**dispatchers, **in_fp8}
    return {
        "rows": [
            {name: rows(each, draw, read_back=name in in_fp8) for name, each in both.items()}
            for draw in range(len(DRAWS))
        ],
        "bytes": {name: bytes_by_rank(each) for name, each in both.items()},
        "halves": {name: errors_in_bfloat16(each) for name, each in both.items()},
        "groups": [torch_distributed.get_process_group_ranks(each) for each in vars(groups.node_groups).values()],
        "refused": refused(),
        "chosen": [vars(grouped(ep, "auto", node).dispatch) for ep, node in ((2, 2), (4, 2), (4, 4), (1, 4))],
        "layouts": layouts(cases),
        "counts": {name: expert_counts(["layer"], **setting(name)) for name in NAMES},
        "steps": [
            recomputed(traffic, name, mode, dtype)
            for name in NAMES
            for mode, dtype in (("none", "training"), ("layer", "training"), ("loop", "training"), ("loop", "fp8"))
        ],
    }


def setting(name: str) -> dict[str, Any]:
    """The part of a case that names a dispatcher."""
    return {"dispatch": name, "ep": 4, "node": NODE}


def grouped(ep_size: int, dispatch: str, node: int = NODE) -> ParallelGroups:
    """The groups of a dispatcher, with so many ranks to a node."""
    found = ProcessEnvironment.detect(os.environ)
    environment = replace(found, local_rank=found.rank % node, local_world_size=node)
    return init_parallel(environment, ep_size, dispatch=dispatch, timeout_s=120.0)


def made(groups: ParallelGroups, *, in_fp8: bool = False) -> dict[str, Dispatcher]:
    """All dispatchers over the same ranks."""
    everyone = require_expert_group(4)
    assert groups.dispatch == DispatchChoice("per_node")
    assert groups.node_groups is not None
    return {
        "all_to_all": AllToAllDispatcher(everyone, in_fp8=in_fp8),
        "per_rank": PerRankDispatcher(everyone, in_fp8=in_fp8),
        "per_node": PerNodeDispatcher(groups.node_groups, in_fp8=in_fp8),
    }


DRAWS: tuple[dict[str, Any], ...] = (
    {"k": 1, "rows": (4, 4, 4, 4)},
    {"k": 2, "rows": (7, 3, 0, 5)},
    {"k": 4, "rows": (6, 6, 6, 6)},
    {"k": 8, "rows": (3, 1, 2, 3)},
    {"k": 2, "rows": (9, 9, 9, 9), "experts": [0, 1]},
    {"k": 3, "rows": (5, 0, 0, 0), "experts": [2, 6, 7]},
    {"k": 2, "rows": (0, 0, 0, 0)},
)
"""Experts of each token, rows of each rank, and which experts all of them choose, where not drawn."""


def drawn(draw: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """This rank's rows, choices, weights, and what its results are multiplied with."""
    case, rank = DRAWS[draw], torch_distributed.get_rank()
    generator = torch.Generator().manual_seed(100 * draw + rank)
    n, k = case["rows"][rank], case["k"]
    choices = torch.rand(n, EXPERTS, generator=generator).topk(k).indices
    if "experts" in case:
        choices = torch.tensor(case["experts"]).expand(n, -1).contiguous()
    values = {name: torch.randn(n, DIM, generator=generator, dtype=dtype) for name in ("rows", "factors", "shared")}
    weights = torch.rand(n, k, generator=generator, dtype=torch.float32 if dtype != torch.float64 else dtype)
    return {**values, "choices": choices, "weights": weights}


def experts(first: int, last: int, dtype: torch.dtype = torch.float64) -> Experts:
    """The experts first .. last - 1 of eight, the same on every rank."""
    held = Experts(last - first, DIM, HIDDEN, Initializer(3), 0.3, first, out_std=0.3)
    return held.to(dtype)


def travel(dispatcher: Dispatcher, held: Experts, given: dict[str, Tensor], *, again: bool = False) -> Tensor:
    """The result of a call; again: of a second one that is given the decision of the first."""
    decision = dispatcher.decide(given["choices"], EXPERTS)
    for _ in range(1 + again):
        journey = dispatcher.send(given["rows"], given["weights"], decision)
        decision = journey.decision
        journey.hand_on()
        journey.compute(held)
        journey.send_back()
        journey.hand_back()
        result = journey.receive(given["shared"], given["factors"])
    return result


def gradients(dispatcher: Dispatcher, held: Experts, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result, and all gradients of its sum with factors."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("rows", "weights", "shared")}
    out = travel(dispatcher, held, {**given, **leaves})
    (out * given["factors"]).sum().backward()
    found = {name: gradient_of(leaf) for name, leaf in leaves.items()}
    return {"out": out.detach(), **found, **{name: gradient_of(value) for name, value in held.named_parameters()}}


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient, zeros where there is none."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def own_experts(dtype: torch.dtype = torch.float64) -> Experts:
    """This rank's."""
    rank = torch_distributed.get_rank()
    return experts(2 * rank, 2 * rank + 2, dtype)


def rows(dispatcher: Dispatcher, draw: int, *, read_back: bool) -> dict[str, Any]:
    """Largest differences from a process with all experts, whether a replay gives the same bits and asks nobody, and
    one routing weight's gradient beside a finite difference. read_back: the process has the rows as they are after
    quantisation, whose gradient is that of the rows before."""
    given, held = drawn(draw), own_experts()
    found = gradients(dispatcher, held, given)
    whole = experts(0, EXPERTS)
    arriving = dequantise_rows(quantise_rows(given["rows"]), dtype=torch.float64) if read_back else given["rows"]
    expected = gradients(LocalDispatcher(), whole, {**given, "rows": arriving})
    rank = torch_distributed.get_rank()
    for name in ("w1", "w2", "w3"):
        torch_distributed.all_reduce(expected[name])
        expected[name] = expected[name][2 * rank : 2 * rank + 2]
    errors = {n: (found[n] - x).abs().max().item() if x.numel() else 0.0 for n, x in expected.items()}
    with calls() as noted:
        same = torch.equal(travel(dispatcher, held, given, again=True), found["out"])
    asked = [call["integers"] for call in noted]
    return {"errors": errors, "same": same, "asked": asked, "difference": difference(dispatcher, given)}


def difference(dispatcher: Dispatcher, given: dict[str, Tensor]) -> float:
    """Of rank 0's first routing weight: its gradient less the change of the sum over all ranks."""
    held = own_experts()

    def total(change: float) -> Tensor:
        weights = given["weights"].clone()
        if torch_distributed.get_rank() == 0 and weights.numel():
            weights[0, 0] += change
        out = (travel(dispatcher, held, {**given, "weights": weights}) * given["factors"]).sum().detach()
        torch_distributed.all_reduce(out)
        return out

    slope = (total(1e-4) - total(-1e-4)) / 2e-4
    own = gradients(dispatcher, held, given)["weights"]
    gradient = own[0, 0] if torch_distributed.get_rank() == 0 and own.numel() else slope
    return (gradient - slope).abs().item()


@contextmanager
def calls() -> Iterator[list[dict[str, Any]]]:
    """Notes what each all-to-all sends to whom."""
    noted: list[dict[str, Any]] = []
    original = torch_distributed.all_to_all_single

    def noting(output: Tensor, given: Tensor, *splits: Any, **options: Any) -> Any:
        ranks = torch_distributed.get_process_group_ranks(options["group"])
        sent = splits[1] if splits else [len(given) // len(ranks)] * len(ranks)
        size = given.element_size() * (given.numel() // len(given) if len(given) else 0)
        to = {rank: number * size for rank, number in zip(ranks, sent, strict=True)}
        noted.append({"integers": given.dtype == torch.int64, "to": to})
        return original(output, given, *splits, **options)

    with patch.object(torch_distributed, "all_to_all_single", noting):
        yield noted


def bytes_by_rank(dispatcher: Dispatcher) -> dict[str, Any]:
    """What a forward and its backward send to each rank, floats and integers, and this rank's choices."""
    given = drawn(2, torch.float32)
    with calls() as noted:
        gradients(dispatcher, own_experts(torch.float32), given)
    sent: dict[str, list[int]] = defaultdict(lambda: [0] * 4)
    for call in noted:
        for rank, size in call["to"].items():
            sent["integers" if call["integers"] else "floats"][rank] += size
    return {"sent": dict(sent), "choices": given["choices"].tolist()}


def errors_in_bfloat16(dispatcher: Dispatcher) -> dict[str, float]:
    """Of the result and the gradients of rows and weights in bf16, against float64; norm over norm."""
    given = drawn(2)
    whole = experts(0, EXPERTS).to(torch.bfloat16).double()
    exact = {name: value.to(torch.bfloat16).double() for name, value in given.items() if name != "choices"}
    exact["weights"] = given["weights"].float().double()
    held = own_experts().to(torch.bfloat16)
    half = {name: value.to(torch.bfloat16) for name, value in exact.items()}
    half["weights"] = exact["weights"].float()
    expected = gradients(LocalDispatcher(), whole, {**exact, "choices": given["choices"]})
    found = gradients(dispatcher, held, {**half, "choices": given["choices"]})
    names = ("out", "rows", "weights")
    values = [(found[name].double() - expected[name], expected[name]) for name in names]
    squares = torch.stack([torch.stack([value.square().sum() for value in pair]) for pair in values])
    torch_distributed.all_reduce(squares)
    return dict(zip(names, (squares[:, 0] / squares[:, 1]).sqrt().tolist(), strict=True))


def refused() -> list[str]:
    """What is said of nodes that do not fit the groups of experts."""
    said = []
    for ep_size, node in ((2, 2), (4, 4), (4, 1)):
        try:
            grouped(ep_size, "per_node", node)
        except ParallelError as error:
            said.append(str(error))
    return said


def recomputed(traffic: CollectiveBytes, name: str, checkpointing: str, dtype: str) -> dict[str, Any]:
    """Bytes that all ranks exchange in a step of 3 loops, 2 of them with gradient, in which every token chooses experts
    0 and 1, which are the first rank's."""
    case = {"stage": 1, "accumulation": 1, "checkpointing": checkpointing, "dispatch_dtype": dtype, **setting(name)}
    with opened(case) as (engine, groups):
        for layer in engine.module.moe_layers():
            layer.router.bias[:2] = 10.0
        traffic.take()
        engine.train_step(own_batches(0, 1, groups), n_loops=3, n_grad_loops=2, lr=1e-3)
        counted = traffic.take()
    sizes = [counted.get("all_to_all_single", 0), counted.get("all_to_all_single:integers", 0)]
    sums = groups.sum([float(size) for size in sizes])
    return {"dispatch": name, "checkpointing": checkpointing, "dtype": dtype, "bytes": sums}
