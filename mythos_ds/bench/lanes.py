"""How much of an exchange two lanes hide: the loops alone, forward and backward, on one core with a simulated link.

What is computed is real, and timed by the thread's own processor time. Rows take a time on their way that follows from
their bytes, one exchange after the other; the clock jumps to their arrival where they are waited for. The link is so
fast that all exchanges together last as long as the computation, or half as long.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.schema import ActivationCheckpointing, ModelConfig
from mythos_ds.costs.flops import expert_flops, recurrent_layer_flops
from mythos_ds.model.dispatch import Dispatcher, Journey, LocalDispatcher
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.routing_replay import RoutingDecision
from mythos_ds.parallel.dispatch_all_to_all import RowsToExperts, SortedRoute
from mythos_ds.parallel.overlap import LANES, overlap
from mythos_ds.parallel.row_exchange import Nobody, Passage

LAYERS, LOOPS, SEQ, ROWS = 4, 4, 512, 4
EXPERT_DIMS = {"1:1": 136, "24:76": 424}
"""Width of an expert by the FLOPs of attention and router over those of experts."""
SHARES = (1.0, 0.5)
"""The exchange's time over that of the computation."""


def loops_model(ratio: str, dim: int = 256) -> ModelConfig:
    """Makes the model of a case: 16 experts, 4 of them chosen, none shared."""
    return ModelConfig(
        vocab_size=64, dim=dim, prelude_layers=1, recurrent_layers=LAYERS, coda_layers=0, max_loops=LOOPS,
        mean_recurrence=LOOPS, attn_type="gqa", n_heads=4, n_kv_heads=4, ffn_dim=64, n_experts=16, n_experts_per_tok=4,
        n_shared_experts=0, expert_dim=EXPERT_DIMS[ratio] * dim // 256, loop_embedding="none", lora_rank=0,
    )  # fmt: skip


class _OneRank:
    """The dispatcher "all_to_all" of a group of one rank."""

    returns_sums: ClassVar[bool] = False

    def decide(self, indices: Tensor, n_experts: int) -> RoutingDecision:
        return LocalDispatcher().decide(indices, n_experts)

    def send(self, rows: Tensor, weights: Tensor, decision: RoutingDecision) -> Journey:
        route = decision.route
        if not isinstance(route, SortedRoute):
            same, number = torch.arange(weights.numel()), [weights.numel()]
            route = SortedRoute(route, number, number, same, same, decision.counts)
        decision = replace(decision, route=route)
        return RowsToExperts(route.rows.sort(rows, weights.shape[1]), weights, decision, Nobody())


class OneRankMoE(MoE):
    """A mixture whose rows leave and come back to the same process."""

    def make_dispatcher(self) -> Dispatcher:
        """Makes the dispatcher of one rank."""
        return _OneRank()


@dataclass
class SimulatedLink:
    """A link of `seconds_per_byte`; counts what it carries, and how long it is waited for."""

    seconds_per_byte: float = 0.0
    bytes: int = 0
    waited: float = 0.0
    _free: float = 0.0

    def now(self) -> float:
        """Tells the time: what this thread computed, and waited."""
        return time.thread_time() + self.waited

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Carries the rows of all passages meanwhile."""
        arrivals: dict[int, float] = {}

        def start(passage: Passage, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
            received = rows.clone()  # as a link would write them
            self._free = max(self.now(), self._free) + rows.nbytes * self.seconds_per_byte
            self.bytes += rows.nbytes
            arrivals[id(passage)] = self._free
            passage._under_way = None, received.detach(), rows.detach()
            return received

        def finish(passage: Passage) -> Tensor:
            assert passage._under_way is not None
            received, passage._under_way = passage._under_way[1], None
            self.waited += max(0.0, arrivals.pop(id(passage)) - self.now())
            return received

        with patch.object(Passage, "_start", start), patch.object(Passage, "_finish", finish):
            yield


class Loops:
    """The loops of one case, ready to run."""

    def __init__(self, ratio: str, unit: ActivationCheckpointing, *, lanes: bool, dim: int = 256):
        config = loops_model(ratio, dim)
        part = ModelChunk((), tuple(range(LAYERS)), (), embeds=False, loops=True, predicts=False)
        self._model = MythosModel(config, part=part, moe_factory=OneRankMoE, activation_checkpointing=unit)
        if lanes:
            overlap(self._model)
        self._context = self._model.make_context(torch.zeros(ROWS, SEQ, dtype=torch.int64), None, None, LOOPS)
        assert len(self._context.lanes) == (LANES if lanes else 0)
        self._e = torch.randn(ROWS, SEQ, config.dim, generator=torch.Generator().manual_seed(0))

    def run(self, link: SimulatedLink) -> float:
        """Runs forward and backward, and returns the seconds of computation; the link knows those of waits."""
        e = self._e.clone().requires_grad_()
        with link.attached():
            started = time.thread_time()
            self._model.recurrent(e, LOOPS, self._context).sum().backward()
            seconds = time.thread_time() - started
        self._model.zero_grad(set_to_none=True)
        return seconds


def measure(ratio: str, unit: ActivationCheckpointing, repetitions: int) -> Iterator[dict[str, Any]]:
    """Measures one lane and two, each at each of `SHARES` of its own computation; the median of `repetitions` runs."""
    sides = {lanes: Loops(ratio, unit, lanes=lanes == 2) for lanes in (1, 2)}
    for case in sides.values():
        case.run(SimulatedLink())
    computed, carried = {}, {}
    for lanes, case in sides.items():
        links = [SimulatedLink() for _ in range(repetitions)]
        computed[lanes] = median(case.run(link) for link in links)
        carried[lanes] = links[0].bytes
    config = loops_model(ratio)
    experts = expert_flops(config) / recurrent_layer_flops(config, SEQ)
    for share in SHARES:
        row: dict[str, Any] = {"attention_to_experts": ratio, "experts_share_of_flops": round(experts, 3)}
        row |= {"recompute": unit, "exchange_to_computation": share}
        for lanes, case in sides.items():
            rate = share * computed[lanes] / carried[lanes]
            exchange, found = rate * carried[lanes], []
            for _ in range(repetitions):
                link = SimulatedLink(rate)
                own = case.run(link)
                found.append((own + link.waited, (own + link.waited) / max(own, exchange)))
            row[f"lanes_{lanes}"] = {
                "computation_s": computed[lanes], "bytes": carried[lanes],
                "seconds": median(seconds for seconds, _ in found), "times_the_longer": median(r for _, r in found),
            }  # fmt: skip
        row["computation_of_two_lanes_to_one"] = computed[2] / computed[1]
        row["two_lanes_to_one"] = row["lanes_2"]["seconds"] / row["lanes_1"]["seconds"]
        yield row
