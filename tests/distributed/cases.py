"""What runs inside the processes of the distributed tests: one call, many layouts."""

import functools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import deepspeed
import torch
import torch.distributed as torch_distributed
from torch import Tensor

from mythos_ds.config.resolve import resolve
from mythos_ds.config.schema import (
    BatchRamp,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from mythos_ds.engine.build import build_engine
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import NumericsError
from mythos_ds.model.forward_stats import ForwardRecords
from mythos_ds.model.mythos import MythosModel
from mythos_ds.parallel.groups import ParallelGroups, init_parallel
from mythos_ds.train.trainer import with_depths
from tests.helpers.reference import ReferenceTrainer
from tests.helpers.toy_model import toy_model

SEQ_LEN = 16
GLOBAL_BATCH = 8
ACCUMULATION = 2
DENSE: dict[str, Any] = {
    "attn_type": "gqa", "n_kv_heads": 1, "head_dim": 16, "kv_lora_rank": None, "q_lora_rank": None,
    "qk_nope_head_dim": None, "qk_rope_head_dim": None, "v_head_dim": None, "attention_biases": "all", "qk_norm": True,
    "qk_norm_span": "all", "norm_placement": "after", "rope_theta": 50.0, "embedding_std": 0.5,
    "no_rope_layers": [1],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0},
}  # fmt: skip
"""A model with all that families of dense models add: biases, norms over all heads and after, stretched RoPE."""
LEARNING_RATE = {"adamw": 3e-3, "sgd": 0.3}
LOOPS = (3, 1, 4, 2)
"""T of each step; the last two loops carry gradient."""
GRAD_LOOPS = 2
DEPTHS = ((3, 1, 2, 2, 1, 1, 3, 2), (1,) * 8, (1, 4, 2, 1, 1, 3, 2, 2), (2, 1, 1, 2, 1, 1, 1, 1))
"""Where each sequence of the global batch has its own T: those of each step, which runs as many loops as LOOPS says."""


RAMP = {"start": 4, "increment": 2, "samples": 10}
RAMPED = (4, 4, 6, 8)
"""Sequences of each step of a batch that grows: whole micro-batches of the four that the last step has."""
RAMP_ACCUMULATION = 4


def numel(parameters: Iterable[Tensor]) -> int:
    """Numbers in parameters that ZeRO-3 cut: all of each, not this rank's part."""
    return sum(vars(parameter)["ds_numel"] for parameter in parameters)


def own_experts(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that the ranks of an expert group hold different ones of."""
    return [parameter for parameter in module.parameters() if not getattr(parameter, "allreduce", True)]


def toy_run(case: dict[str, Any], world_size: int) -> RunConfig:
    """The run of a case: ep, stage, and optionally pp, checkpointing, dispatch, dispatch_dtype, overlap, optimizer,
    dtype, accumulation, offload, training, deepspeed, model."""
    pp_size, accumulation = case.get("pp", 1), case.get("accumulation", ACCUMULATION)
    accumulation = RAMP_ACCUMULATION if case.get("ramp") else accumulation
    holders = world_size // pp_size if isinstance(pp_size, int) else pp_size[1]
    optimizer = {"optimizer": "sgd"} if case.get("optimizer") == "sgd" else {"optimizer": "adamw", "eps": 1e-6}
    batch = {"micro_batch_size": GLOBAL_BATCH // (holders * accumulation), "global_batch_size": GLOBAL_BATCH}
    losses = {"grad_clip": 0.3, "balance_loss": 1e-2, "z_loss": 1e-3, "router_bias_rate": 1e-2}
    return RunConfig(
        model=toy_model(**case.get("model", {})),
        parallel=ParallelConfig(
            ep_size=case["ep"],
            pp_size=pp_size,
            zero_stage=case["stage"],
            activation_checkpointing=case.get("checkpointing", "loop"),
            dispatch=case.get("dispatch", "all_to_all"),
            dispatch_dtype=case.get("dispatch_dtype", "training"),
            overlap=case.get("overlap", False),
            offload_optimizer="cpu" if "offload" in case else "none",
            offload_params="cpu" if case.get("offload") == "all" else "none",
        ),
        training=TrainingConfig(
            seq_len=SEQ_LEN,
            max_steps=100,
            lr=1e-2,
            lr_reference_dim=16,
            dtype=case.get("dtype", "float32"),
            global_batch_ramp=BatchRamp(**RAMP) if case.get("ramp") else None,
            **{**batch, **optimizer, **losses, **case.get("training", {})},
        ),
        data=DataConfig(datasets=[DatasetConfig(prefix="unused")], tokenizer="unused"),
        deepspeed=case.get("deepspeed", {}),
    )


@contextmanager
def opened(case: dict[str, Any]) -> Iterator[tuple[TrainingEngine, ParallelGroups]]:
    """The engine of a case, destroyed at the end so that the next one can follow in the same processes."""
    environment = ProcessEnvironment.detect(os.environ)
    node = case.get("node", environment.world_size)  # so many consecutive ranks are taken for a node
    environment = replace(environment, local_rank=environment.rank % node, local_world_size=node)
    resolved = resolve(toy_run(case, environment.world_size), environment.world_size)
    groups = init_parallel(
        environment,
        case["ep"],
        resolved.stages,
        tied=resolved.config.model.tie_embeddings,
        dispatch=resolved.config.parallel.dispatch,
        rows_in_fp8=resolved.config.parallel.dispatch_dtype == "fp8",
        timeout_s=120.0,
    )
    engine = build_engine(resolved, groups)
    try:
        yield engine, groups
    finally:
        engine.deepspeed.destroy()


def global_batches(step: int, accumulation: int, *, masked: bool = False) -> list[dict[str, Tensor]]:
    """The micro-batches of a step over all ranks: int64 [GLOBAL_BATCH / accumulation, SEQ_LEN] each. masked: few
    targets count, of some rows none, of others nearly all."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, 64, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    # Skewed, so that experts get uneven loads.
    text = torch.where(torch.rand(text.shape, generator=generator) < 0.3, 7, text)
    positions = torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    positions[1::2, 5:] -= 5
    whole = {"tokens": text[:, :-1], "targets": text[:, 1:], "positions": positions}
    if masked:
        shares = torch.tensor([0.0, 0.0, 0.9, 0.2, 0.0, 0.4, 0.1, 0.5])
        counts = torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator) < shares[:, None]
        whole |= {"targets": torch.where(counts, text[:, 1:], -100), "counted": counts.sum(1)}
    size = GLOBAL_BATCH // accumulation
    return [{name: value[i * size : (i + 1) * size] for name, value in whole.items()} for i in range(accumulation)]


def own_batches(
    step: int, accumulation: int, groups: ParallelGroups, *, masked: bool = False
) -> list[dict[str, Tensor]]:
    """This rank's rows of each micro-batch."""
    return [
        {name: value.chunk(groups.layout.dp_size)[groups.layout.dp_rank].clone() for name, value in batch.items()}
        for batch in global_batches(step, accumulation, masked=masked)
    ]


def full_weights(engine: TrainingEngine, groups: ParallelGroups) -> dict[str, Tensor]:
    """Every weight, whole, by logical name."""
    return everywhere(full_weights_of_stage(engine, groups))


def full_weights_of_stage(engine: TrainingEngine, groups: ParallelGroups) -> dict[str, Tensor]:
    """Every weight of the calling rank's pipeline stage, whole, by logical name."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            value = parameter.detach().float().clone()
        if not getattr(parameter, "allreduce", True):
            parts = [torch.empty_like(value) for _ in range(groups.layout.ep_size)]
            torch_distributed.all_gather(parts, value, group=groups.ep_group)
            value = torch.cat(parts)
        weights[name] = value.cpu()
    return weights


def everywhere(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all pipeline stages by name, on every rank."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(torch_distributed.get_world_size())]
    torch_distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def trained_plainly(name: str) -> bool:
    """Parameters that neither decay nor follow the width: no matrix, or one that does not act on the width."""
    plain = ("embed.weight", "router.weight", "norm.weight", "loop_embedding.gain", "lora.scale")
    return name.endswith((*plain, ".bias")) or "injection" in name


def move_router_biases(biases: dict[str, Tensor], counts: dict[int, Tensor], rate: float) -> None:
    """The balancing rule, written out: b by the load over all loops, each loop's row by its own at a quarter."""
    for layer, own in counts.items():
        prefix = f"recurrent.layers.{layer}.moe.router"
        total = own.sum(0)
        biases[f"{prefix}.bias"] += rate * (total.mean() - total).sign()
        for loop, load in enumerate(own):
            row = biases[f"{prefix}.loop_bias"][loop]
            row += rate / 4 * (load.mean() - load).sign()
            row -= row.mean()
            biases[f"{prefix}.loop_updates"][loop] += 1


@functools.cache
def reference_run(
    optimizer: str,
    changes: str = "{}",
    per_sequence: bool = False,
    ramp: bool = False,
    frozen: tuple[str, ...] = (),
    masked: bool = False,
) -> dict[str, Any]:
    """Losses, gradient norms, final weights and router buffers of the independent single-process reference; `changes`
    are the case's to the model, as JSON. per_sequence: it runs each sequence alone, at its depth of DEPTHS; ramp: its
    steps have as many sequences as RAMPED says; frozen: patterns of the names that are not trained; masked: not all
    targets count."""
    resolved = resolve(toy_run({"ep": 1, "stage": 1, "optimizer": optimizer, "model": json.loads(changes)}, 1), 1)
    training, config = resolved.config.training, resolved.config.model
    model = MythosModel(config, seed=training.seed)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer = reference_trainer(dict(model.named_parameters()), biases, config, training, frozen)
    losses, norms = [], []
    for step, loops in enumerate(LOOPS):
        parts = GLOBAL_BATCH if per_sequence else RAMP_ACCUMULATION if ramp else ACCUMULATION
        own = list(DEPTHS[step]) if per_sequence else loops
        batches = global_batches(step, parts, masked=masked)[: RAMPED[step] * parts // GLOBAL_BATCH if ramp else None]
        loss, norm = trainer.step(batches, own, GRAD_LOOPS, LEARNING_RATE[optimizer])
        move_router_biases(biases, trainer.counts, resolved.router_bias_rate)
        losses.append(loss)
        norms.append(norm)
    weights = {name: value.detach() for name, value in trainer.params.items()}
    return {"loss": losses, "norm": norms, "weights": weights, "biases": biases}


def reference_trainer(
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    config: ModelConfig,
    training: TrainingConfig,
    frozen: tuple[str, ...] = (),
) -> ReferenceTrainer:
    """The reference with a case's settings."""
    return ReferenceTrainer(
        weights,
        config,
        optimizer=training.optimizer,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
        decays=lambda name: not trained_plainly(name),
        lr_scale=lambda name: 1.0 if trained_plainly(name) else training.lr_reference_dim / config.dim,
        grad_clip=training.grad_clip,
        balance=training.balance_loss,
        z=training.z_loss,
        router_bias=biases,
        frozen=lambda name: any(fnmatch(name, pattern) for pattern in frozen),
    )


def largest(values: Iterable[float]) -> float:
    """The maximum, which is NaN where any value is: Python's own max would lose it."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def layouts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout the largest deviation from the reference: relative loss and norm, absolute weight and buffer."""
    return [_layout(case) for case in cases]


def _layout(case: dict[str, Any]) -> dict[str, Any]:
    optimizer, accumulation = case["optimizer"], case.get("accumulation", ACCUMULATION)
    per_sequence, ramp, masked = (case.get(name, False) for name in ("per_sequence", "ramp", "masked"))
    accumulation = RAMP_ACCUMULATION if ramp else accumulation
    with opened(case) as (engine, groups):
        results = []
        for step, loops in enumerate(LOOPS):
            batches = own_batches(step, accumulation, groups, masked=masked)
            if ramp:
                batches = batches[: RAMPED[step] * accumulation // GLOBAL_BATCH]
            held, lr = batches[:1], LEARNING_RATE[optimizer]
            if per_sequence:
                batches = with_depths(batches, DEPTHS[step], groups.layout)
            results.append(engine.train_step(batches, n_loops=loops, n_grad_loops=GRAD_LOOPS, lr=lr))
            engine.eval_loss(held, 5)  # another depth in between must not disturb the next step
        weights = full_weights(engine, groups)
        biases = everywhere({name: buffer.cpu().clone() for name, buffer in engine.module.named_buffers()})
    frozen = tuple(case.get("training", {}).get("frozen", ()))
    expected = reference_run(optimizer, json.dumps(case.get("model", {})), per_sequence, ramp, frozen, masked)
    return {
        "loss": largest(abs(r.loss - x) / x for r, x in zip(results, expected["loss"], strict=True)),
        "norm": largest(abs(r.grad_norm - x) / x for r, x in zip(results, expected["norm"], strict=True)),
        "smallest_norm": min(r.grad_norm for r in results),
        "weight": largest((weights[n] - w).abs().max().item() for n, w in expected["weights"].items()),
        "same_names": weights.keys() == expected["weights"].keys() and biases.keys() == expected["biases"].keys(),
        "buffer": largest((biases[n] - b).abs().max().item() for n, b in expected["biases"].items()),
        "largest_bias": max(b.abs().max().item() for n, b in biases.items() if n.endswith("router.bias")),
    }


def buffers_under_zero_init() -> dict[str, Any]:
    """bf16: the first losses with (stage 3) and without (stage 2) zero.Init, fp32 losses, and the router buffers."""
    out: dict[str, Any] = {"loss": {}, "dtypes": [], "values": []}
    for name, stage, dtype in (("zero_init", 3, "bfloat16"), ("plain", 2, "bfloat16"), ("float32", 3, "float32")):
        with opened({"ep": 2, "stage": stage, "dtype": dtype}) as (engine, groups):
            buffers = dict(engine.module.named_buffers())
            out["dtypes"] += [str(buffer.dtype) for buffer in buffers.values()]
            out["values"] += [buffer.abs().max().item() for buffer in buffers.values()]
            losses = [
                engine.train_step(own_batches(s, ACCUMULATION, groups), n_loops=t, n_grad_loops=2, lr=3e-3).loss
                for s, t in enumerate(LOOPS)
            ]
            out["loss"][name] = losses
            bias = engine.module.moe_layers()[0].router.bias
            out[f"bias_{name}"] = [str(bias.dtype), bias.unique().tolist()]
            out["parameter_dtype"] = str(next(iter(engine.module.parameters())).dtype)
    return out


def rank_without_tokens() -> dict[str, Any]:
    """All tokens go to experts 0 and 1, so the second expert-parallel rank computes nothing: weights after two steps,
    against the layout that does not share experts out."""
    weights = []
    for ep in (1, 2):
        with opened({"ep": ep, "stage": 3, "optimizer": "sgd"}) as (engine, groups):
            for layer in engine.module.moe_layers():
                layer.router.bias[:2] = 10.0
            for step in range(2):
                engine.train_step(own_batches(step, ACCUMULATION, groups), n_loops=3, n_grad_loops=2, lr=0.3)
            records = ForwardRecords()
            engine.deepspeed(own_batches(0, ACCUMULATION, groups)[0]["tokens"], n_loops=3, records=records)
            counts = records.routing[0][2].counts.tolist()
            weights.append(full_weights(engine, groups))
    difference = largest((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    return {"difference": difference, "counts": counts}


def special_cases() -> dict[str, Any]:
    """The cases above and below, in one launch."""
    return {
        "nothing_counts": step_without_targets(),
        "buffers": buffers_under_zero_init(),
        "no_tokens": rank_without_tokens(),
        "non_finite": non_finite_loss(),
        "skipped": non_finite_norm({"ep": 2, "stage": 3}),
    }


def step_without_targets() -> dict[str, Any]:
    """A step, and an evaluation, in which no target counts, between others: losses and gradient norms."""
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        found = []
        for step in range(3):
            batches = own_batches(step, ACCUMULATION, groups, masked=True)
            if step == 1:
                none = torch.tensor(-100)
                batches = [{**b, "targets": none.expand_as(b["targets"]), "counted": 0 * b["counted"]} for b in batches]
                nothing = engine.eval_loss(batches, 2)
            found.append(engine.train_step(batches, n_loops=2, n_grad_loops=2, lr=1e-3))
    return {"loss": [r.loss for r in found], "norm": [r.grad_norm for r in found], "eval": nothing}


def non_finite_norm(case: dict[str, Any]) -> dict[str, Any]:
    """A second step in which the last stage finds a norm that is not finite: the error, and whether weights moved."""
    with opened(case) as (engine, groups):
        engine.train_step(own_batches(0, ACCUMULATION, groups), n_loops=2, n_grad_loops=2, lr=1e-3)
        before = full_weights_of_stage(engine, groups)
        optimizer = engine.deepspeed.optimizer
        sums = optimizer.get_grad_norm_direct

        def damaged(*args: Any, **kwargs: Any) -> Tensor:
            norm = sums(*args, **kwargs)
            return torch.full_like(norm, -1.0) if groups.layout.stage == len(groups.layout.stage_sizes) - 1 else norm

        optimizer.get_grad_norm_direct = damaged
        error = None
        try:
            engine.train_step(own_batches(1, ACCUMULATION, groups), n_loops=2, n_grad_loops=2, lr=1e-3)
        except NumericsError as found:
            error = str(found)
        after = full_weights_of_stage(engine, groups)
    return {"error": error, "moved": largest((after[n] - w).abs().max().item() for n, w in before.items())}


def non_finite_loss() -> dict[str, Any]:
    """A step after weights exploded: every rank raises, and says so."""
    with opened({"ep": 2, "stage": 3}) as (engine, groups):
        batches = own_batches(0, ACCUMULATION, groups)
        try:
            for _ in range(3):
                engine.train_step(batches, n_loops=2, n_grad_loops=2, lr=1e30)
        except NumericsError as error:
            return {"error": str(error)}
    return {"error": None}
