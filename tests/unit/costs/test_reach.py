"""Where a token's experts lie: the closed forms against our router on random scores, at the sizes of 1t."""

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.communicators import communicators
from mythos_ds.costs.reach import places_reached, planned_dispatch
from mythos_ds.kernels.routing import best_experts

TOKENS, NODES, RANKS = 20_000, 32, 256


def one_trillion(limit: int | None = None) -> ModelConfig:
    model = load_config("1t", []).config.model
    return model.model_copy(update={"n_expert_groups": NODES if limit else None, "n_limited_groups": limit})


def reached(model: ModelConfig) -> dict[int, torch.Tensor]:
    """For each number of places, which of them the experts of 20,000 tokens lie on: bool [tokens, places]."""
    scores = torch.rand(TOKENS, model.n_experts, generator=torch.Generator().manual_seed(1))
    chosen = best_experts(
        scores, k=model.n_experts_per_tok, n_groups=model.n_expert_groups, n_limited_groups=model.n_limited_groups
    )
    found = {}
    for places in (NODES, RANKS):
        hit = torch.zeros(TOKENS, places, dtype=torch.bool)
        found[places] = hit.scatter_(1, chosen // (model.n_experts // places), True)
    return found


@pytest.mark.parametrize(("limit", "copies"), [(None, 6.97), (4, 3.87)])
def test_copies_that_leave_the_node(limit: int | None, copies: float) -> None:
    model = one_trillion(limit)
    hit = reached(model)
    # Every node holds as many tokens, so that one of them may stand for all.
    left = hit[NODES][:, 1:].sum(1).float().mean().item()
    assert left == pytest.approx(copies, abs=0.02)
    assert model.n_experts_per_tok * (1 - 1 / NODES) == 7.75, "a copy for each expert"
    for places, found in hit.items():
        mean = found.sum(1).float().mean().item()
        assert places_reached(model, places) == pytest.approx(mean, rel=0.01), places


def test_small_numbers_by_hand() -> None:
    """Two of four experts, on two places: only one of the six pairs lies on each place alone."""
    small = one_trillion().model_copy(update={"n_experts": 4, "n_experts_per_tok": 2})
    assert places_reached(small, 2) == pytest.approx(2 - 2 / 6)
    assert places_reached(small, 4) == pytest.approx(2)
    assert places_reached(small, 1) == pytest.approx(1)
    limited = small.model_copy(update={"n_expert_groups": 2, "n_limited_groups": 1})
    assert places_reached(limited, 2) == pytest.approx(1)
    assert places_reached(limited, 4) == pytest.approx(2)


@pytest.mark.parametrize(("limit", "error"), [(2, 0.02), (4, 0.02), (8, 0.06)])
def test_groups_of_other_sizes_than_nodes(limit: int, error: float) -> None:
    """Twice as many groups as nodes: two chosen groups may lie on one node, which is counted once."""
    model = one_trillion().model_copy(update={"n_expert_groups": 2 * NODES, "n_limited_groups": limit})
    mean = reached(model)[NODES].sum(1).float().mean().item()
    assert places_reached(model, NODES) == pytest.approx(mean, rel=error)


def test_a_run_by_node_has_two_more_communicators() -> None:
    plain, by_node = (
        resolve(load_config("1t", [f"parallel.dispatch={name}"]).config, 1024) for name in ("all_to_all", "per_node")
    )
    more = communicators(by_node)[len(communicators(plain)) :]
    assert [(group.name, group.size, group.nodes, group.peers) for group in more] == [
        ("experts across nodes", 32, 32, 31),
        ("experts of a node", 8, 1, 7),
    ]
    assert planned_dispatch(plain).name == "all_to_all"
    assert (planned_dispatch(by_node).name, planned_dispatch(by_node).ranks_per_node) == ("per_node", 8)
