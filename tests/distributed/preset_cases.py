"""Runs inside the processes of test_preset_proxies.py: every preset's proxy takes a few steps."""

import os
from typing import Any

import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.proxy import make_proxy
from mythos_ds.config.resolve import resolve
from mythos_ds.engine.build import build_engine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.parallel.groups import init_parallel
from mythos_ds.train.depth_sampler import DepthSampler

STEPS = 3


def train_proxies(presets: list[str]) -> list[dict[str, Any]]:
    """For each preset: losses and gradient norms of three steps, what it kept, and whether weights moved."""
    environment = ProcessEnvironment.detect(os.environ)
    return [_train(preset, environment) for preset in presets]


def _train(preset: str, environment: ProcessEnvironment) -> dict[str, Any]:
    config, changes = make_proxy(load_config(preset).config, environment.world_size)
    resolved = resolve(config, environment.world_size)
    groups = init_parallel(environment, resolved.ep_size)
    engine = build_engine(resolved, groups)
    model, training = config.model, config.training
    sampler = DepthSampler.of(config)
    generator = torch.Generator().manual_seed(groups.layout.dp_rank)
    shape = (training.micro_batch_size, training.seq_len + 1)
    text = torch.randint(0, model.vocab_size, shape, generator=generator)
    positions = torch.arange(training.seq_len).repeat(training.micro_batch_size, 1)
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "positions": positions}
    results = [
        engine.train_step(
            [batch] * resolved.gradient_accumulation_steps,
            n_loops=sampler.loops_at(step),
            n_grad_loops=resolved.mean_backprop_depth,
            lr=training.lr,
        )
        for step in range(STEPS)
    ]
    engine.deepspeed.destroy()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "ep_size": resolved.ep_size,
        "zero_stage": config.parallel.zero_stage,
        "layers": model.recurrent_layers,
        "vocab_size": model.vocab_size,
        "changes": len(changes),
    }
