"""Permutation chains: the labels, the packing, and what is made of accuracies."""

import numpy as np
import pytest

from mythos_ds.lab.tasks.chains import _TEST, _TRAIN, Chains, ChainTask, frontier, slope

TASK = ChainTask(entities=8, relations=6, train_hops=5, test_hops=20, table_seed=3)


def _follow(tokens: np.ndarray) -> list[int]:
    """The entity reached at each position, by looking the relations up one by one."""
    tables = TASK.tables()
    reached: list[int] = []
    for token in tokens:
        reached.append(int(token) if token < 8 else int(tables[token - 8][reached[-1]]))
    return reached


@pytest.mark.parametrize("split", [_TRAIN, _TEST])
def test_labels_are_the_entities_reached(split: int) -> None:
    for index in range(50):
        item = Chains(TASK, split, seed=1, samples=50)[index]
        assert item["targets"].tolist() == _follow(item["tokens"])


def test_training_chains_are_short_and_test_chains_fill_the_sequence() -> None:
    for index in range(200):
        tokens = Chains(TASK, _TRAIN, seed=0, samples=200)[index]["tokens"]
        starts = [place for place, token in enumerate(tokens) if token < 8]
        assert starts[0] == 0
        assert max(np.diff([*starts, len(tokens)])) <= 6  # an entity and at most five relations
        tokens = Chains(TASK, _TEST, seed=0, samples=200)[index]["tokens"]
        assert len(tokens) == 21
        assert tokens[0] < 8
        assert (tokens[1:] >= 8).all()


def test_samples_depend_on_split_seed_and_number_only() -> None:
    def first(split: int, seed: int, samples: int) -> list[int]:
        return Chains(TASK, split, seed, samples)[5]["tokens"].tolist()

    assert first(_TRAIN, 0, 10) == first(_TRAIN, 0, 999)
    assert first(_TRAIN, 0, 10) != first(_TRAIN, 1, 10)
    assert first(_TRAIN, 0, 10) != first(1, 0, 10)


def test_tables_are_permutations_and_differ_by_seed() -> None:
    tables = TASK.tables()
    assert (np.sort(tables, axis=1) == np.arange(8)).all()
    other = ChainTask(8, 6, 5, 20, table_seed=4).tables()
    assert (tables != other).any()


def test_frontier_is_the_last_hop_before_the_first_failure() -> None:
    assert frontier({4: [1.0, 0.9, 0.5, 0.99], 8: [0.9] * 4, 1: [0.2] * 4}) == {4: 2, 8: 4, 1: 0}


def test_slope_leaves_out_what_is_cut_off() -> None:
    assert slope({4: 5, 6: 7, 8: 9, 48: 20, 1: 0}, 20) == pytest.approx(1.0)
    assert slope({48: 20}, 20) is None
