"""Bringing an engine of any layout to the state of a checkpoint that another layout wrote, or to given weights.

Every rank reads only the elements that it holds, from whatever files have them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mythos_ds.checkpoint.deepspeed_format import STEP, WEIGHTS
from mythos_ds.checkpoint.portable import StateTensors, open_state
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.engine.training_engine import TrainingEngine
from mythos_ds.errors import CheckpointError, TensorMismatchError
from mythos_ds.log import get_logger
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.parallel.groups import ParallelGroups
from mythos_ds.weights.reader import TensorSource, TensorSpec, elements
from mythos_ds.weights.whole_model import check_whole

_MUON_STATE = "momentum_buffer"
_logger = get_logger(__name__)
_PARTITIONED = "fp32_partitioned_groups_flat"
"""What only DeepSpeed's ZeRO-3 optimizer has."""


@dataclass(frozen=True)
class _Part:
    """What this rank's optimizer holds of a parameter: `numel` elements of `flat` from `start` on are those of the
    local tensor from `offset` on. `flat` is what the optimizer keys its state by."""

    name: str
    flat: Tensor
    start: int
    offset: int
    numel: int


def load_resharded(engine: TrainingEngine, groups: ParallelGroups, tag: Path, step: int) -> None:
    """Fill a freshly built engine with weights, optimizer state, buffers and counters of `tag`, saved after `step`
    steps. Parameters that were frozen begin with moments of zero and the others' number of updates.

    Raises CheckpointError where the checkpoint is of another model or another optimizer.
    """
    tensors, updates = open_state(tag)
    weights = tensors.pop(WEIGHTS)
    model = engine.resolved.config.model
    loops = read_state(tag).config["model"].get("max_loops", model.max_loops)
    check_whole(weights.specs(), model.model_copy(update={"max_loops": loops}))
    _check_names(str(tag), engine.module, weights)
    _place(engine, groups, weights, _with_new(engine, tensors, groups), updates)
    deepspeed = engine.deepspeed
    deepspeed.global_steps = step
    deepspeed.global_samples = step * deepspeed.train_batch_size()
    deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()


def _with_new(
    engine: TrainingEngine, states: dict[str, StateTensors], groups: ParallelGroups
) -> dict[str, StateTensors]:
    """The optimizer's states, with zeros for the parameters that are trained now and were frozen before."""
    trained = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    new = [(name, parameter) for name, parameter in trained if all(name not in s.specs() for s in states.values())]
    if not states or not new:
        return states
    if groups.rank == 0:
        _logger.info("%d parameters that were frozen begin with moments of zero: %s ...", len(new), new[0][0])
    muon = engine.resolved.config.training.optimizer == "muon"
    begun = dict(states)
    for kind in states:
        own = {name for name, p in new if not muon or getattr(p, "use_muon", False) == (kind == _MUON_STATE)}
        begun[kind] = _Begun(states[kind], own)
    return begun


class _Begun:
    """States of one kind, with zeros for parameters that had none."""

    def __init__(self, source: StateTensors, new: set[str]):
        self.source, self.new = source, new

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor; of the new ones the shape is not known."""
        return {**self.source.specs(), **{name: TensorSpec(torch.float32, ()) for name in self.new}}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that was there before."""
        return self.source.read(name, rows)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""
        return torch.zeros(stop - start) if name in self.new else self.source.elements(name, start, stop)


def load_weights(engine: TrainingEngine, groups: ParallelGroups, source: TensorSource, name: str) -> None:
    """Fill a freshly built engine with the weights and buffers of a whole model, one tensor at a time; everything else
    of it stays as it is. Each rank reads what it holds, so nothing is sent. name: the source's, for messages.

    Raises CheckpointError where a tensor is missing, has another shape or holds a value that is not finite.
    """
    weights = _Finite(source, name)
    _check_names(name, engine.module, weights)
    for own, parameter in engine.module.named_parameters():
        shape = _shape(parameter)
        whole = (shape[0] * groups.layout.ep_size, *shape[1:]) if is_expert(own) else shape
        if (found := weights.specs()[own].shape) != whole:
            raise TensorMismatchError(f"{name}: {own} has the shape {list(found)}; the model's has {list(whole)}")
    _place(engine, groups, weights, {}, 0.0)


class _Finite:
    """Tensors of which no element is NaN or infinite."""

    def __init__(self, source: TensorSource, name: str):
        self.source, self.name, self._specs = source, name, source.specs()

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor."""
        return self._specs

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows. Raises CheckpointError for a value that is not finite."""
        value = self.source.read(name, rows)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{self.name}: {name} holds NaN or infinite values", code="MDS515")
        return value

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor."""
        return elements(self, name, start, stop)


def _place(
    engine: TrainingEngine,
    groups: ParallelGroups,
    weights: StateTensors,
    states: dict[str, StateTensors],
    updates: float,
) -> None:
    """Write weights, buffers and the optimizer's states to where the engine keeps them."""
    zero, module = engine.deepspeed.optimizer, engine.module
    partitioned = hasattr(zero, _PARTITIONED)
    if partitioned:
        zero.checkpoint_event_prologue()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            base = _base(name, parameter, groups)
            if not partitioned:
                parameter.copy_(weights.elements(name, base, base + parameter.numel()).view_as(parameter))
            elif not parameter.requires_grad:
                _fill_frozen(name, parameter, base, weights, zero)
        for name, buffer in module.named_buffers():
            if name in weights.specs():
                value = weights.read(name)
                rows = min(len(value), len(buffer))  # tables of loops have as many as the run's max_loops
                buffer.zero_()[:rows] = value[:rows]
        parameters = dict(module.named_parameters())
        for part in _parts(zero, module):
            _fill(part, parameters[part.name], groups, zero, weights, states, updates)
    if partitioned:
        zero.checkpoint_event_epilogue()


def _fill_frozen(name: str, parameter: Any, base: int, weights: StateTensors, zero: Any) -> None:
    """This rank's part of a weight that ZeRO-3 cuts up and the optimizer does not hold."""
    size, numel = parameter.partition_numel(), prod(_shape(parameter))
    offset = min(zero._get_param_partition_rank(parameter) * size, numel)
    held = min(size, numel - offset)
    parameter.ds_tensor.data.view(-1)[:held].copy_(weights.elements(name, base + offset, base + offset + held))


def _check_names(name: str, module: nn.Module, weights: StateTensors) -> None:
    stored = weights.specs()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    persistent = set(module.state_dict(keep_vars=True)) & set(own)
    if missing := sorted(persistent - set(stored)):
        raise TensorMismatchError(f"{name}: has no {missing[0]} ({len(missing)} tensors of the model are missing)")


def _base(name: str, parameter: nn.Parameter, groups: ParallelGroups) -> int:
    """Where the local tensor begins in the logical one: experts are cut over the expert-parallel ranks."""
    return groups.layout.ep_rank * prod(_shape(parameter)) if is_expert(name) else 0


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _parts(zero: Any, module: nn.Module) -> Iterator[_Part]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    if hasattr(zero, _PARTITIONED):
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in group:
                size, numel = parameter.partition_numel(), prod(_shape(parameter))
                offset = min(zero._get_param_partition_rank(parameter) * size, numel)
                yield _Part(names[parameter], flat, start, offset, min(size, numel - offset))
                start += size
    elif hasattr(zero, "fp32_groups"):  # mixed precision without ZeRO
        for group, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield _Part(names[parameter], master, 0, 0, master.numel())
    elif hasattr(zero, "bit16_groups") or hasattr(zero, "bf16_groups"):
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
        for group, flat in zip(groups, flats, strict=True):
            for parameter in group:
                if parameter._hp_mapping is not None:
                    local, held = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                    yield _Part(names[parameter], flat, held.start, local.start, local.numel)
    else:
        for parameter, name in names.items():
            yield _Part(name, parameter, 0, 0, parameter.numel())


def _fill(
    part: _Part,
    parameter: nn.Parameter,
    groups: ParallelGroups,
    zero: Any,
    weights: StateTensors,
    states: dict[str, StateTensors],
    updates: float,
) -> None:
    first = _base(part.name, parameter, groups) + part.offset
    held = slice(part.start, part.start + part.numel)
    values = weights.elements(part.name, first, first + part.numel)
    part.flat.view(-1)[held].copy_(values)
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data.view(-1)[: part.numel].copy_(values)
    if not states:
        return
    state = getattr(zero, "optimizer", zero).state[part.flat]
    for kind, source in states.items():
        if part.name in source.specs():
            if kind not in state:
                state[kind] = torch.zeros_like(part.flat)
            state[kind].view(-1)[held].copy_(source.elements(part.name, first, first + part.numel))
    _count(state, updates, part.flat)


def _count(state: dict[str, Any], updates: float, flat: Tensor) -> None:
    """Set Adam's number of updates, as the optimizer keeps it: a tensor (torch, on the device where it is fused) or a
    number (DeepSpeed's)."""
    if "exp_avg" not in state:
        return
    if isinstance(state.get(STEP), Tensor):
        state[STEP].fill_(updates)
    elif STEP in state:
        state[STEP] = int(updates)
    else:
        device = flat.device if flat.is_cuda else torch.device("cpu")
        state[STEP] = torch.tensor(updates, dtype=torch.float32, device=device)
