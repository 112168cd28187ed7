"""The channels of a pipeline's messages: what shares one, and what waiting for one another costs."""

import pytest

from mythos_ds.costs.schedule import channel_edges, channel_of
from tests.helpers.message_simulation import Shape, Step, channels, none_waits, one_for_all

SHAPES = [
    Shape.of_ring(stages, micro_batches, loops, grad_loops)
    for stages in range(2, 9)
    for micro_batches in (stages, 2 * stages)
    for loops in (1, 2, 3, 5, 8)
    for grad_loops in sorted({1, loops // 2 or 1, loops})
]
LITERAL = [Shape(3, micro_batches, 1, 1, ring=False) for micro_batches in (1, 2, 3, 4, 8, 32)]


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "line"])
@pytest.mark.parametrize("n_stages", range(2, 10))
def test_a_stage_has_one_role_on_a_channel(n_stages: int, ring: bool) -> None:
    """It sends results on the edge after it and gradients on the one before; no other edge of the colour touches it."""
    edges = channel_edges(n_stages, ring=ring)
    for pairs in edges.values():
        stages = [stage for pair in pairs for stage in pair]
        assert len(stages) == len(set(stages))
    assert sum(map(len, edges.values())) == 2 * (n_stages if ring else n_stages - 1)
    colours = 3 if ring and n_stages % 2 else min(2, n_stages if ring else n_stages - 1)
    assert len(edges) == 2 * colours
    for channel, pairs in edges.items():
        for first, second in pairs:
            assert second == (first + 1) % n_stages
            assert channel_of(first, n_stages, forward=channel.forward, ring=ring) == channel


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        (Shape.of_ring(2, 8, 16, 8), 0.081),
        (Shape.of_ring(4, 16, 16, 8), 0.131),
        (Shape.of_ring(4, 4, 16, 8), 0.218),
        (Shape.of_ring(8, 32, 16, 8), 0.198),
    ],
    ids=str,
)
def test_idle_share(shape: Shape, shared: float) -> None:
    """As good as if no message waited for another, to half a percentage point; on one communicator it is much worse."""
    free, ours = Step(shape, none_waits).idle_share(), Step(shape, channels(shape)).idle_share()
    assert ours == pytest.approx(free, abs=0.005)
    worse = Step(shape, one_for_all).idle_share()
    assert worse == pytest.approx(shared, abs=0.001)
    assert worse > free + 0.015


@pytest.mark.parametrize("n_stages", [3, 5, 7])
def test_idle_share_of_an_odd_ring(n_stages: int) -> None:
    shape = Shape.of_ring(n_stages, 2 * n_stages, 16, 8)
    free, ours = Step(shape, none_waits).idle_share(), Step(shape, channels(shape)).idle_share()
    assert ours == pytest.approx(free, abs=0.005)
    assert Step(shape, one_for_all).idle_share() > free + 0.02


def test_no_shape_waits_for_itself() -> None:
    for shape in [*SHAPES, *LITERAL]:
        assert 0 <= Step(shape, channels(shape)).idle_share() < 1


def test_a_shape_that_waits_for_itself_is_found() -> None:
    """Both directions of all edges on one communicator, with a stage that takes what it gives in another order."""
    shape = Shape.of_ring(2, 2, 2, 2)
    step = Step(shape, one_for_all)
    step.actions[1] = step.actions[1][::-1]
    with pytest.raises(ValueError, match="wait for each other"):
        step.idle_share()
