"""Fine-grained mixture of experts (DeepSeekMoE, Dai et al. 2024): dropless, with always-on shared experts.

Tokens are sorted by expert once, computed group by group, and put back by the inverse permutation. Where the experts
live is the dispatcher's business: expert parallelism replaces the `Experts` and the `Dispatcher`, nothing else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.config.schema import ModelConfig
from mythos_ds.kernels.routing import count_experts, router_losses
from mythos_ds.model.auxiliary_losses import attach_loss
from mythos_ds.model.context import ForwardContext
from mythos_ds.model.dispatch import Dispatcher, LocalDispatcher
from mythos_ds.model.feed_forward import Experts, FeedForward
from mythos_ds.model.forward_stats import ForwardRecords, RoutingRecord, jaccard_overlap, masked_mean
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.loop_index import repeat_by_token
from mythos_ds.model.router import Router, Routing
from mythos_ds.model.steps import Steps, finish


class MoE(nn.Module):
    """Router, routed experts and shared experts: [batch, seq, dim] -> [batch, seq, dim].

    `layer` is its index among the model's recurrent layers, under which it notes what the router did.
    """

    def __init__(self, config: ModelConfig, init: Initializer, *, layer: int = 0):
        nn.Module.__init__(self)
        self.layer = layer
        self.n_experts = config.n_experts
        self.router = Router(config, init.at("router"))
        self.experts = self.make_experts(config, init.at("experts"))
        self.shared_experts: FeedForward | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.resolved_shared_dim
            own = init.at("shared_experts")
            self.shared_experts = FeedForward(
                config.dim, width, own, config.resolved_init_std, config.resolved_output_std
            )
        self.dispatcher = self.make_dispatcher()

    def make_experts(self, config: ModelConfig, init: Initializer) -> Experts:
        """Makes the routed experts that this process holds."""
        sizes = config.n_experts, config.dim, config.expert_dim
        return Experts(*sizes, init, config.resolved_init_std, out_std=config.resolved_output_std)

    def make_dispatcher(self) -> Dispatcher:
        """Makes the dispatcher by which rows reach their experts."""
        return LocalDispatcher()

    def forward(
        self,
        x: Tensor,
        loop: int,
        context: ForwardContext,
        alive: Tensor | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """alive: bool [batch, seq], False where a halted position should not count in load and losses; so do sequences
        that have not begun. stream: the residual stream [batch, seq, dim] that the result is added to, if any."""
        return finish(self.steps(x, loop, context, alive, stream))

    def steps(
        self,
        x: Tensor,
        loop: int,
        context: ForwardContext,
        alive: Tensor | None = None,
        stream: Tensor | None = None,
    ) -> Steps[Tensor]:
        """Does what `forward` does, and stops twice where it would wait next: with the rows under way, and with their
        results. Of several chunks the results of one leave while the next is computed."""
        rows, n = x.flatten(0, -2), context.exchange_chunks
        kept = None if context.replay is None else context.replay.get(self.layer)
        index = context.index_at(loop).by_token(len(rows))
        routing: Routing = self.router(rows, index, None if kept is None else _joined([d.indices for d in kept]))
        decisions = kept or [self.dispatcher.decide(part, self.n_experts) for part in _chunks(routing.indices, n)]
        counts = decisions[0].counts if n == 1 else torch.stack([decision.counts for decision in decisions]).sum(0)
        weights = self._note(routing, counts, loop, context, alive, x.shape[:2])
        parts = zip(_chunks(rows, n), _chunks(weights, n), decisions, strict=True)
        journeys = [self.dispatcher.send(*part) for part in parts]
        if context.replay is not None and kept is None:
            context.replay[self.layer] = [journey.decision for journey in journeys]
        shared = None if self.shared_experts is None else self.shared_experts(x).flatten(0, -2)  # while rows travel
        yield
        for journey in journeys:
            journey.hand_on()
        # A recompute that ends here has all that its backward needs before any result comes back.
        needed = kept is None or context.last_replayed != self.layer or not self.dispatcher.returns_sums
        for journey in journeys:
            journey.compute(self.experts)
            if needed:
                journey.send_back()
        if not needed:
            yield
            return torch.empty_like(x if stream is None else stream)
        for journey in journeys:
            journey.hand_back()
        yield
        stream = None if stream is None else stream.flatten(0, -2)
        added = zip(journeys, _chunks(shared, n), _chunks(stream, n), strict=True)
        return _joined([journey.receive(*given) for journey, *given in added]).view_as(x)

    def _note(
        self,
        routing: Routing,
        counts: Tensor,
        loop: int,
        context: ForwardContext,
        alive: Tensor | None,
        shape: torch.Size,
    ) -> Tensor:
        """Writes the record, and returns the routing weights with the auxiliary losses attached."""
        mask = None if alive is None else alive.float()
        weights, balance, z = routing.weights, None, None
        aux, depths = context.aux, context.depths
        if aux is not None and (aux.balance or aux.z):
            shares = None if depths is None else depths.loss_weights(loop, context.n_grad_loops)
            scores, logits, indices = (
                value.unflatten(0, shape) for value in (routing.scores, routing.logits, routing.indices)
            )
            alive_rows = None if mask is None else mask[..., None]
            total, balance, z = router_losses(scores, logits, indices, alive_rows, shares, balance=aux.balance, z=aux.z)
            if torch.is_grad_enabled():
                weights = attach_loss(weights, total * (aux.scale / context.n_grad_loops))
            if shares is not None:  # as notes, means over the sequences that have begun
                whole = shares.mean().clamp_min(1e-30)
                balance, z = balance / whole, z / whole
        if context.records.open:
            with torch.no_grad():
                mask = mask if depths is None else repeat_by_token(depths.begun(loop), len(routing.indices))
                self._record(context.records, loop, routing, counts, mask, balance, z)
        return weights

    def _record(
        self,
        records: ForwardRecords,
        loop: int,
        routing: Routing,
        counts: Tensor,
        mask: Tensor | None,
        balance: Tensor | None,
        z: Tensor | None,
    ) -> None:
        own, depths = records.routing[self.layer], records.depths

        def count(indices: Tensor) -> Tensor:
            if depths is None:
                return count_experts(indices, self.n_experts, mask).float()
            row = repeat_by_token(depths.index(loop), len(indices))[:, None]
            counted = count_experts(indices + self.n_experts * row, self.n_experts * depths.n_loops, mask)
            return counted.view(depths.n_loops, -1).float()

        counts = counts.float() if mask is None and depths is None else count(routing.indices)
        if not records.details:
            own[loop] = RoutingRecord(counts, balance, z)
            return
        share = routing.scores / routing.scores.sum(-1, keepdim=True)
        before = own.get(loop - 1)
        unbiased = self.router.choose(routing.scores, None)
        overlap = None
        if before is not None and before.indices is not None:
            both = mask if depths is None else repeat_by_token(depths.begun(loop - 1), len(share))
            overlap = jaccard_overlap(before.indices, routing.indices, both)
        own[loop] = RoutingRecord(
            counts,
            balance,
            z,
            prebias_counts=count(unbiased),
            entropy=masked_mean(-torch.xlogy(share, share).sum(-1), mask),
            indices=routing.indices,
            overlap_previous=overlap,
        )


def _chunks(values: Tensor | None, n: int) -> Sequence[Any]:
    """Cuts the first dimension into n equal parts; None stands for each of them, if there is nothing."""
    if values is None or n == 1:
        return [values] * n
    return values.chunk(n)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
