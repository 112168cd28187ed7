"""How often evaluations run which loop counts, and what part of a run they take."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mythos_ds.config.loader import list_presets, load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.costs.evaluation import evaluation_share
from mythos_ds.costs.flops import expected_flops_per_token, flops_per_token
from mythos_ds.errors import ConfigError
from mythos_ds.train.trainer import Trainer

SHALLOW, DEEP = [1, 4, 8, 16], [1, 4, 8, 16, 32, 64]
RUN = ["training.max_tokens=null", "training.max_steps=1001", "training.eval_interval=100"]


def evaluations(*overrides: str) -> list[list[int]]:
    """The loop counts of each periodic evaluation of a run of 1b, as the trainer asks for them."""
    config = load_config("1b", [*RUN, "checkpoint.interval=0", *overrides]).config
    asked: list[list[int]] = []
    trainer = SimpleNamespace(
        config=config, step=0, _evaluate=lambda _metrics, counts: asked.append(counts), _samples=list
    )
    metrics = SimpleNamespace(samples=lambda *_: None)
    for step in range(1, 1002):
        trainer.step = step
        Trainer._after_step(cast(Any, trainer), cast(Any, metrics), 1001)
    return asked


def test_deep_loops_are_evaluated_as_often_as_asked() -> None:
    assert evaluations("training.eval_deep_every=4") == [
        DEEP if number % 4 == 0 else SHALLOW for number in range(1, 11)
    ]
    assert evaluations("training.eval_deep_every=1") == [DEEP] * 10


@pytest.mark.parametrize("every", [1, 3])
def test_their_share_is_that_of_their_forwards(every: int) -> None:
    overrides = [*RUN, f"training.eval_deep_every={every}", "training.eval_batches=2"]
    run = resolve(load_config("1b", overrides).config, 8)
    model, batch = run.config.model, run.tokens_per_step
    forwards = [flops_per_token(model, context=4096, n_loops=loops) for counts in
                [*evaluations(*overrides), DEEP] for loops in counts]  # fmt: skip
    evaluated = 2 * batch * sum(cost.forward + cost.attention for cost in forwards)
    step = expected_flops_per_token(run.config, run.mean_backprop_depth)
    trained = 1001 * batch * (step.training + step.recompute)
    assert evaluation_share(run) == pytest.approx(evaluated / (evaluated + trained))
    assert evaluation_share(resolve(load_config("1b", [*overrides, "data.validation=none"]).config, 8)) == 0


@pytest.mark.parametrize("name", [name for name in list_presets() if name != "tiny"])
def test_presets_spend_little_on_evaluation(name: str) -> None:
    config = load_config(name).config
    assert evaluation_share(resolve(config, planned_world_size(config))) < 0.015


def test_a_count_of_evaluations_that_there_are_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_deep_every: has no effect") as caught:
        load_config("1b", ["training.eval_interval=0", "training.eval_deep_every=2"])
    assert [problem.code for problem in caught.value.problems] == ["MDS770"]
