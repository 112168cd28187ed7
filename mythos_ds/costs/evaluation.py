"""What a run's evaluations cost beside its training."""

from mythos_ds.config.depth_distribution import evaluation_depths
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import expected_flops_per_token, flops_per_token


def evaluation_share(run: ResolvedRun) -> float:
    """Computes the part of a run's, or training stage's, FLOPs that its evaluations after steps take, 0..1: forwards of
    `eval_batches` full batches at each loop count, beside training with what it recomputes."""
    config = run.config
    training = config.training
    if not config.data.validates:
        return 0.0
    periodic = (run.max_steps - 1) // training.eval_interval if training.eval_interval else 0
    deep = periodic // training.eval_deep_every + 1  # the last one is at the end
    flops = (periodic + 1 - deep) * _forwards(run, deep=False) + deep * _forwards(run, deep=True)
    evaluated = flops * training.eval_batches * training.global_batch_size * training.seq_len
    cost = expected_flops_per_token(config, run.mean_backprop_depth, run.grows_from)
    return evaluated / (evaluated + (cost.training + cost.recompute) * run.total_tokens)


def _forwards(run: ResolvedRun, *, deep: bool) -> float:
    """FLOPs of one token in one evaluation."""
    model, context = run.config.model, run.config.training.seq_len
    costs = [
        flops_per_token(model, context=context, n_loops=loops)
        for loops in evaluation_depths(model.mean_recurrence, deep=deep)
    ]
    return sum(cost.forward + cost.attention for cost in costs)
