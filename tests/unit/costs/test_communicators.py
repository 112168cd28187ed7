"""Memory outside of torch's allocator: by the groups of a run, or as it was measured."""

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.costs.communicators import communicators, outside_bytes


def sizes(name: str, processes: int, *overrides: str) -> dict[str, tuple[int, int]]:
    found = communicators(resolve(load_config(name, overrides).config, processes))
    return {group.name: (group.size, group.nodes) for group in found if group.bytes}


def test_groups_and_their_nodes():
    world = {"all processes": (1024, 128), "DeepSpeed's copy of it": (1024, 128)}
    one_trillion = {**world, "experts": (256, 32), "copies of experts": (4, 4)}
    assert sizes("1t", 1024, "parallel.dispatch=all_to_all") == one_trillion
    by_node = {"experts across nodes": (32, 32), "experts of a node": (8, 1)}
    assert sizes("1t", 1024) == {**one_trillion, **by_node}
    assert sizes("1b", 8, "parallel.ep_size=8") == {
        "all processes": (8, 1),
        "DeepSpeed's copy of it": (8, 1),
        "experts": (8, 1),
    }
    assert sizes("tiny", 1) == {}
    ring = sizes("1t", 1024, "parallel.pp_size=4", "parallel.ep_size=256", "parallel.dispatch=all_to_all")
    assert ring == {**world, "pipeline stage": (256, 32), "experts": (256, 32), "ring": (1024, 1)}


def test_the_ends_of_a_pipeline_share_a_tied_embedding():
    """A group of the ranks of the first and the last stage, as `parallel/groups.py` makes it; none of those between."""
    parts = [
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=null",
        "parallel.pp_size=[1,2,1]",
        "parallel.ep_size=1",
        "training.micro_batch_size=2",
        "training.global_batch_size=12",
    ]
    for tied, groups in ((True, [1, 0, 1]), (False, [0, 0, 0])):
        run = resolve(load_config("tiny", [*parts, f"model.tie_embeddings={str(tied).lower()}"]).config, 4)
        found = [[g for g in communicators(run, index) if g.name == "tied embedding"] for index in range(3)]
        assert [len(each) for each in found] == groups
        assert all((g.size, g.nodes, g.bytes) == (2, 1, 0.2e9) for each in found for g in each)


def test_bytes_grow_with_groups_and_peers():
    def outside(name: str, processes: int, *overrides: str) -> float:
        return outside_bytes(resolve(load_config(name, overrides).config, processes))

    assert 3.5e9 <= outside("1t", 1024) <= 5e9
    few, many = (outside("1t", 1024, f"parallel.ep_size={n}", "parallel.dispatch=all_to_all") for n in (128, 256))
    assert many - few == pytest.approx(128 * 4e6)
    assert outside("tiny", 1) < outside("1b", 8) < 2e9
    assert outside("1t", 1024, "cluster.context_bytes=4200000000") == 4.2e9
