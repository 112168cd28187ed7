"""Balancing over 200 training steps: the bias moves, and the load that training makes uneven evens out again."""

import torch

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.context import AuxLoss
from mythos_ds.model.forward_stats import ForwardRecords, load_imbalance
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import update_router_bias
from mythos_ds.train.depth_sampler import DepthSampler

CONFIG = ModelConfig(
    vocab_size=256,
    dim=256,
    prelude_layers=1,
    recurrent_layers=1,
    coda_layers=1,
    max_loops=4,
    mean_recurrence=2,
    attn_type="gqa",
    n_heads=4,
    ffn_dim=256,
    n_experts=64,
    n_experts_per_tok=4,
    expert_dim=32,
    n_shared_experts=1,
)
STEPS = 100
RATE = 1e-2


def _train(rate: float) -> tuple[list[float], MythosModel]:
    """max / mean expert load of each step, over all loops, of a model that learns a skewed bigram text."""
    model = MythosModel(CONFIG, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    depth = DepthSampler("poisson", 2, 0.5, 4, 0)
    generator = torch.Generator().manual_seed(0)
    successor = torch.randint(0, 256, (256,), generator=generator)
    imbalances = []
    for step in range(STEPS):
        text = [torch.randint(0, 32, (4, 1), generator=generator)]
        for _ in range(48):
            noise = torch.rand(4, 1, generator=generator) < 0.2
            text.append(torch.where(noise, torch.randint(0, 256, (4, 1), generator=generator), successor[text[-1]]))
        tokens = torch.cat(text, dim=1)
        records = ForwardRecords()
        options = {"targets": tokens[:, 1:], "aux": AuxLoss(1e-4, 1e-5), "records": records}
        loss = model(tokens[:, :-1], n_loops=depth.loops_at(step), **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moe = model.moe_layers()[0]
        counts = torch.stack([record.counts for _, record in sorted(records.routing[0].items())])
        update_router_bias(moe.router, counts, rate)
        imbalances.append(load_imbalance(counts.sum(0)).item())
    return imbalances, model


def test_the_bias_moves_and_the_load_evens_out() -> None:
    balanced, model = _train(RATE)
    left_alone, _ = _train(0.0)
    early, end = sum(balanced[20:40]) / 20, sum(balanced[-20:]) / 20
    assert end < early
    assert end < sum(left_alone[-20:]) / 20
    router = model.moe_layers()[0].router
    assert router.bias.abs().max() >= 5 * RATE
    assert router.loop_bias.abs().max() > 0
    assert router.loop_updates[0] == STEPS
