"""The router: load at the start, the balancing rule over loops, and megatron-core's router as an oracle."""

from typing import Any

import pytest
import torch

from mythos_ds.kernels.routing import count_experts
from mythos_ds.model.forward_stats import ForwardRecords, load_imbalance
from mythos_ds.model.initializer import Initializer
from mythos_ds.model.loop_index import LoopIndex
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.router import MIN_ROW_UPDATES, Router, update_router_bias
from tests.helpers.toy_model import toy_config


def router(**changes: Any) -> Router:
    return Router(toy_config(**changes), Initializer(2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_every_expert_is_used_at_the_start(seed: int, score: str) -> None:
    config = toy_config(vocab_size=2048, dim=256, n_experts=64, n_experts_per_tok=4, expert_dim=16, router_score=score)
    model = MythosModel(config, seed=seed)
    tokens = torch.randint(0, config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(seed))
    records = ForwardRecords()
    with torch.no_grad():
        model(tokens, n_loops=3, targets=tokens, records=records)
    assert len(records.routing) == config.recurrent_layers
    for own in records.routing.values():
        for record in own.values():
            assert record.counts.sum() == tokens.numel() * 4
            assert (record.counts > 0).all()
            assert load_imbalance(record.counts) < 3


def test_bias_moves_against_the_load() -> None:
    module = router()
    counts = torch.tensor([[5.0, 1, 3, 3, 3, 3, 3, 3], [3.0, 3, 1, 5, 3, 3, 3, 3]])
    update_router_bias(module, counts, 0.01)
    assert torch.allclose(module.bias, 0.01 * torch.tensor([-1.0, 1, 1, -1, 0, 0, 0, 0]))
    rows = 0.0025 * torch.tensor([[-1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0, 0, 0]])
    assert torch.allclose(module.loop_bias[:2], rows)
    assert not module.loop_bias[2:].any()
    assert module.loop_updates.tolist() == [1, 1, 0, 0, 0, 0]


def test_rows_stay_centred_and_loops_beyond_the_table_count_in_the_sum_only() -> None:
    module = router(max_loops=2)
    counts = torch.zeros(3, 8)
    counts[:, 0] = 8.0
    counts[2] = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 800])
    update_router_bias(module, counts, 0.01)
    assert torch.allclose(module.bias, 0.01 * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -1]))
    assert torch.allclose(module.loop_bias.sum(1), torch.zeros(2), atol=1e-8)
    assert (module.loop_bias[:, 0] < 0).all()
    assert module.loop_updates.tolist() == [1, 1]


def test_equal_load_moves_nothing() -> None:
    module = router()
    update_router_bias(module, torch.full((3, 8), 7.0), 0.01)
    assert not module.bias.any()
    assert not module.loop_bias.any()


def test_deep_loops_use_the_last_trusted_row() -> None:
    module = router()
    module.bias.copy_(torch.arange(8.0))
    module.loop_bias.copy_(10.0 * torch.arange(1.0, 7.0)[:, None].expand(6, 8))

    def used(loop: int) -> float:
        return (module.selection_bias(LoopIndex(loop)) - module.bias)[0].item() / 10 - 1

    assert [used(loop) for loop in (0, 3)] == [0, 0], "nothing trusted yet: the first row"
    module.loop_updates[:3] = torch.tensor([MIN_ROW_UPDATES + 50.0, MIN_ROW_UPDATES, MIN_ROW_UPDATES - 1])
    assert [used(loop) for loop in (0, 1, 2, 5, 40)] == [0, 1, 1, 1, 1]
    module.loop_updates[:] = MIN_ROW_UPDATES
    assert [used(loop) for loop in (0, 4, 5, 6, 40)] == [0, 4, 5, 5, 5]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    module = router(route_scale=2.0)
    x = torch.randn(50, 32)
    module.bias[6:] = 100.0
    routing = module(x, LoopIndex(0))
    assert routing.indices.sort(-1).values.tolist() == [[6, 7]] * 50
    chosen = routing.scores.gather(-1, routing.indices)
    assert torch.allclose(routing.weights, 2.0 * chosen / chosen.sum(-1, keepdim=True))
    assert torch.allclose(routing.weights.sum(-1), torch.full((50,), 2.0))


def test_the_rule_balances_a_skewed_router() -> None:
    module = router(n_experts=16)
    x = torch.randn(2048, 32) + 5.0 * torch.nn.functional.normalize(module.weight[0], dim=0)
    loads = []
    with torch.no_grad():
        for _ in range(400):
            counts = count_experts(module(x, LoopIndex(0)).indices, 16).float()
            loads.append(load_imbalance(counts).item())
            update_router_bias(module, counts[None], 2e-3)
    assert loads[0] > 3
    assert loads[-1] < 1.2


def test_computes_in_fp32_with_bf16_weights() -> None:
    module = router()
    module.weight.data = module.weight.data.bfloat16()
    x = torch.randn(20, 32).bfloat16()
    routing = module(x, LoopIndex(0))
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, x.float() @ module.weight.float().T)


def test_counts_with_a_mask() -> None:
    indices = torch.tensor([[0, 1], [1, 2], [3, 1]])
    assert count_experts(indices, 5).tolist() == [1, 3, 1, 1, 0]
    assert count_experts(indices, 5, torch.tensor([1.0, 0.0, 1.0])).tolist() == [1, 2, 0, 1, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_choices_and_weights_equal_megatron(score: str, groups: tuple[int, int] | None) -> None:
    oracle = pytest.importorskip("megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed")
    changes: dict[str, Any] = {"n_experts": 16, "n_experts_per_tok": 4, "router_score": score, "route_scale": 1.5}
    if groups is not None:  # 4 of 2 groups: the oracle sums the best 4/2 = 2 scores of a group, as we do
        changes |= {"n_expert_groups": groups[0], "n_limited_groups": groups[1]}
    module = router(**changes)
    if score == "sigmoid":
        module.bias.copy_(0.1 * torch.randn(16))
    routing = module(torch.randn(300, 32), LoopIndex(0))
    grouped = {} if groups is None else {"num_groups": groups[0], "group_topk": groups[1]}
    if score == "softmax" and groups is not None:
        grouped["use_pre_softmax"] = True  # group scores are sums of probabilities; weights are then not normalised
    probabilities, chosen = oracle.topk_routing_with_score_function(
        routing.logits.detach(),
        4,
        scaling_factor=1.5,
        score_function=score,
        expert_bias=module.bias if score == "sigmoid" else None,
        **grouped,
    )
    ours = torch.zeros_like(routing.logits).scatter(-1, routing.indices, routing.weights)
    if "use_pre_softmax" in grouped:
        probabilities = 1.5 * probabilities / probabilities.sum(-1, keepdim=True)
    assert torch.equal(ours > 0, chosen)
    assert torch.allclose(ours, probabilities, atol=1e-6)
