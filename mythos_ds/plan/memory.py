"""Bytes on one process, item by item, and whether they fit."""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from mythos_ds.config.layout import ModelChunk
from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.config.schema import ModelConfig, TrainingConfig
from mythos_ds.costs.communicators import CUDA_CONTEXT_BYTES, communicators
from mythos_ds.costs.pipeline import PipelinePrediction, predict
from mythos_ds.costs.reach import planned_dispatch
from mythos_ds.hardware import PADS_GROUPS
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.parameter_roles import MATRIX, is_expert, role_of
from mythos_ds.plan.activation_trace import Workload, coda_bytes, dense_layer_bytes, loops_bytes, trace, visit_bytes

FRAGMENTATION = 0.05
"""Of what comes and goes: an allowance for the allocator."""
DEFAULT_REDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed averages at once unless `reduce_bucket_size` says otherwise."""
_SUB_GROUP = _LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's defaults, in elements."""
_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Item:
    """Something that takes memory: bytes, and why."""

    name: str
    bytes: float
    why: str


@dataclass(frozen=True)
class States:
    """Bytes that stay on a process from step to step."""

    weights: int
    masters: int
    optimizer: int
    gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.masters + self.optimizer + self.gradients


@dataclass(frozen=True)
class Memory:
    """The memory of the fullest process.

    Attributes:
        items: what takes it, at the moment of its peak.
        stage: the pipeline stage it belongs to; 0 without pipeline.
    """

    items: tuple[Item, ...]
    stage: int

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(item.bytes for item in self.items)

    @property
    def largest(self) -> Item:
        """What takes most."""
        return max(self.items, key=lambda item: item.bytes)


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@cache
def parameter_shapes(model: ModelConfig, part: ModelChunk | None = None) -> Shapes:
    """(name, shape) of every parameter of a model, or of a part of it."""
    with torch.device("meta"):
        made = MythosModel(model, part=part)
    return tuple((name, tuple(parameter.shape)) for name, parameter in made.named_parameters())


def held_elements(shapes: Shapes, ranks: int, ep_size: int) -> tuple[int, int]:
    """Elements of its parts that each of `ranks` processes holds under ZeRO-3, padding included, as (matrices, all).

    Expert weights are cut by expert over ep_size processes, then over those that hold the same experts.
    """
    matrices = total = 0
    for name, shape in shapes:
        cut = ep_size if is_expert(name) else 1
        held = -(-(prod(shape) // cut) // (ranks // cut))
        total += held
        matrices += held if role_of(name, len(shape)) == MATRIX else 0
    return matrices, total


def states(resolved: ResolvedRun, index: int = 0) -> States:
    """What a process of a stage keeps under ZeRO-3: weights in the training type, fp32 masters, optimizer state, and
    the fp32 sum of gradients."""
    stage = resolved.stages[index]
    ep_size = resolved.layout(stage.first_rank).ep_size
    shapes = parameter_shapes(resolved.config.model, stage.part)
    matrices, held = held_elements(shapes, stage.size, ep_size)
    training = resolved.config.training
    kept = {"adamw": 8 * held, "sgd": 0, "muon": 4 * matrices + 8 * (held - matrices)}[training.optimizer]
    return States(_BYTES[training.dtype] * held, 4 * held, kept, 4 * held)


def workload(resolved: ResolvedRun, index: int = 0, *, on_gpu: bool = True) -> Workload:
    """What a process of a stage computes in a micro-batch."""
    stage, config = resolved.stages[index], resolved.config
    dispatch = planned_dispatch(resolved)
    return Workload(
        config.model,
        stage.rows,
        config.training.seq_len,
        resolved.mean_backprop_depth,
        resolved.ep_size,
        torch.bfloat16 if config.training.dtype == "bfloat16" else torch.float32,
        config.parallel.activation_checkpointing,
        torch.bfloat16 if _adds_up_in_bfloat16(config.training) else torch.float32,
        dispatch=dispatch.name,
        rows_in_fp8=dispatch.in_fp8,
        ranks_per_node=dispatch.ranks_per_node if dispatch.name == "per_node" else 1,
        on_gpu=on_gpu,
        compiled=(config.training.compile or ("regions" if on_gpu else "none")) == "regions",
        overlap=config.parallel.overlap,
        pads_groups=config.cluster is not None and config.cluster.gpu in PADS_GROUPS,
    )


def _adds_up_in_bfloat16(training: TrainingConfig) -> bool:
    return "bfloat16" == training.dtype == training.grad_dtype


def reduced_bytes(resolved: ResolvedRun) -> int:
    """Bytes of a number of the gradients that are averaged over ranks."""
    default = {"bfloat16": "bf16", "float32": "fp32"}[resolved.config.training.dtype]
    return {"bf16": 2, "fp16": 2, "fp32": 4}[resolved.deepspeed.get("communication_data_type", default)]


def reduce_bucket_bytes(resolved: ResolvedRun) -> int:
    """The buffer that gradients are averaged in."""
    zero = resolved.deepspeed.get("zero_optimization", {})
    return int(zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET)) * reduced_bytes(resolved)


def memory(resolved: ResolvedRun, *, on_gpu: bool = True) -> Memory:
    """The memory of the fullest process. ZeRO-3 only: other stages hold whole weights, and no preset uses them.

    on_gpu: with the device's context, an allowance for the allocator, and the kernels that a GPU uses.
    """
    expected = mean_step(resolved)
    stages = [stage_memory(resolved, index, on_gpu, expected) for index in range(len(resolved.stages))]
    return max(stages, key=lambda found: found.total)


def mean_step(resolved: ResolvedRun) -> PipelinePrediction | None:
    """A step at the mean loop count; None without pipeline. Raises ConfigError where it is too long to be simulated."""
    return predict(resolved, resolved.config.model.mean_recurrence) if len(resolved.stages) > 1 else None


def stage_memory(resolved: ResolvedRun, index: int, on_gpu: bool, expected: PipelinePrediction | None) -> Memory:
    """The memory of a process of one pipeline stage, of a step as `expected`; None without pipeline."""
    kept, parallel = states(resolved, index), resolved.config.parallel
    in_host = 0 if parallel.offload_params == "cpu" else kept.weights
    items = [Item("weights", in_host, "this process's part, in the training type")]
    offloaded = parallel.offload_optimizer == "cpu"
    if not offloaded:
        items += [
            Item("master weights", kept.masters, "fp32"),
            Item("optimizer state", kept.optimizer, resolved.config.training.optimizer),
            Item("gradients", kept.gradients, "fp32 sum of this process's part"),
        ]
    bucket = Item("reduce bucket", reduce_bucket_bytes(resolved), "deepspeed.zero_optimization.reduce_bucket_size")
    moving = _step_items(resolved, on_gpu) if expected is None else _pipeline_items(resolved, index, on_gpu, expected)
    update = _update_items(resolved, index, offloaded)
    # The update comes after the backward: the larger of the two counts.
    items += max([bucket, *moving], update, key=lambda chosen: sum(item.bytes for item in chosen))
    if on_gpu:
        dynamic = sum(item.bytes for item in moving)
        items.append(Item("fragmentation", FRAGMENTATION * dynamic, f"{FRAGMENTATION:.0%} of what comes and goes"))
        items += _outside_items(resolved, index)
    return Memory(tuple(items), index)


def _outside_items(resolved: ResolvedRun, index: int) -> list[Item]:
    """What lies outside of the allocator."""
    cluster = resolved.config.cluster
    if cluster is not None and cluster.context_bytes is not None:
        return [Item("context", cluster.context_bytes, "device context and communicators: cluster.context_bytes")]
    groups = communicators(resolved, index)
    why = ", ".join(f"{group.name} ({group.size:,})" for group in groups if group.bytes)
    return [
        Item("context", CUDA_CONTEXT_BYTES, "device context and kernels"),
        Item("communicators", sum(group.bytes for group in groups), why or "one process"),
    ]


def _step_items(resolved: ResolvedRun, on_gpu: bool) -> list[Item]:
    load = workload(resolved, on_gpu=on_gpu)
    found = trace(load)
    kept = saved_state_bytes(load)
    live = {"none": "of all loops with gradient", "layer": "one recomputed layer with its gradients",
            "loop": "one recomputed loop with its gradients"}[load.checkpointing]  # fmt: skip
    return [
        Item("weights kept for reuse", _kept_for_reuse(resolved), "DeepSpeed's stage3_max_live_parameters"),
        Item("gathered weights and gradients", found.peak - found.without_weights, "the looped block, held as one"),
        Item("states", kept, f"fp32 input of each recomputed {load.checkpointing}, {load.grad_loops} with gradient"),
        Item("activations", found.without_weights - kept, live),
    ]


def _kept_for_reuse(resolved: ResolvedRun) -> int:
    """Weights outside of the loop that DeepSpeed does not release, because their next use is near."""
    zero = resolved.deepspeed.get("zero_optimization", {})
    most = int(zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS))
    shapes = parameter_shapes(resolved.config.model, resolved.stages[0].part)
    outside = sum(prod(shape) for name, shape in shapes if not name.startswith("recurrent."))
    return min(most, outside) * _BYTES[resolved.config.training.dtype]


def saved_state_bytes(load: Workload) -> int:
    """What loops with gradient keep for being computed again: the fp32 input of each, or of each of their layers."""
    inputs = {"none": 0, "layer": load.model.recurrent_layers, "loop": 1}[load.checkpointing]
    return load.grad_loops * inputs * load.rows * load.seq_len * load.model.dim * 4


def _pipeline_items(resolved: ResolvedRun, index: int, on_gpu: bool, expected: PipelinePrediction) -> list[Item]:
    """A stage of a pipeline holds its weights, and their gradients in fp32, during the step."""
    stage, config = resolved.stages[index], resolved.config
    ep_size = resolved.layout(stage.first_rank).ep_size
    shapes = parameter_shapes(config.model, stage.part)
    whole_elements = sum(prod(shape) // (ep_size if is_expert(name) else 1) for name, shape in shapes)
    messages = expected.peak_held_bytes[index]
    load = workload(resolved, index, on_gpu=on_gpu)
    head = 4 * config.model.vocab_size * config.model.dim if stage.part.predicts else 0
    coda = coda_bytes(load, stage.part.coda) - head if head else len(stage.part.coda) * dense_layer_bytes(load)
    # A prelude waits until its loops are through, and so do visits that are not recomputed; a coda is followed by its
    # backward.
    waiting = _most_waiting(expected, index, "prelude") * len(stage.part.prelude)
    visit = 0
    if whole := _most_waiting(expected, index, "loops"):  # a stage that runs all loops at once
        visit = loops_bytes(load, stage.part.recurrent, whole)
    elif stage.part.recurrent:
        visit = visit_bytes(load, stage.part.recurrent, _most_waiting(expected, index, "loop"))
    return [
        Item("stage's weights", whole_elements * _BYTES[config.training.dtype], "gathered once per step"),
        Item("stage's gradients", whole_elements * 4, "added up in fp32"),
        Item("messages", messages, "kept for backwards, by simulation"),
        Item("prelude", waiting * dense_layer_bytes(load), "of the micro-batches that are in the loop"),
        Item("activations", max(visit, coda), "of visits that wait and one that is recomputed, or the coda's"),
        *([Item("head", head, "its gradient, fp32")] if head else []),
    ]


def _most_waiting(expected: PipelinePrediction, index: int, kind: str) -> int:
    """The most visits of a kind that a stage has between forward and backward."""
    now = most = 0
    for span in expected.simulation.timeline[index]:
        visit = expected.visits[index][span.action.visit]
        if visit.kind == kind and visit.has_gradient:
            now += -1 if span.action.backward else 1
            most = max(most, now)
    return most


def _update_items(resolved: ResolvedRun, index: int, offloaded: bool) -> list[Item]:
    """DeepSpeed updates one sub-group at a time; its gradients are copied for the optimizer."""
    if offloaded:
        return []
    stage = resolved.stages[index]
    ep_size = resolved.layout(stage.first_rank).ep_size
    zero = resolved.deepspeed.get("zero_optimization", {})
    _, held = held_elements(parameter_shapes(resolved.config.model, stage.part), stage.size, ep_size)
    largest = min(held, int(zero.get("sub_group_size", _SUB_GROUP)))
    return [Item("update", 4 * largest, "gradients of one sub-group, fp32")]
