"""Training checkpoints as logical tensors: which pieces of which files make up each weight and each optimizer state.

DeepSpeed's files say by themselves what they hold; this module is the one place that knows their form. ZeRO-3 cuts each
parameter into equal parts over its ranks; ZeRO 1 and 2 cut a whole group of parameters; ZeRO 0 keeps tensors whole.
Expert weights are first cut by expert over the expert-parallel ranks. A pipeline stage has a folder of its own.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_ds.checkpoint.manifest import MANIFEST, STATE
from mythos_ds.checkpoint.training_state import read_state
from mythos_ds.config.layout import RankLayout
from mythos_ds.errors import DamagedCheckpointError
from mythos_ds.io import read_bytes
from mythos_ds.model.parameter_roles import is_expert, is_frozen, role_of
from mythos_ds.weights.reader import TensorSpec
from mythos_ds.weights.safe_load import executes_pickles, safe_load

WEIGHTS = "weights"
"""Kind of the fp32 weights; other kinds are the optimizer's: exp_avg, exp_avg_sq, momentum_buffer."""
STEP = "step"
FROZEN = -1
"""Stands for the group of weights that no optimizer holds: each lies in the model's file under its own name."""


@dataclass(frozen=True)
class Piece:
    """Elements of a logical tensor: `numel` of them from `offset` on are those of `file` from `start` on, in the flat
    group `group` (ZeRO) or under the tensor's own name (ZeRO 0, group None; group FROZEN)."""

    offset: int
    numel: int
    file: str
    group: int | None
    start: int


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor as the model names it, and the pieces that tile it, by offset. More than one tiling: copies that
    pipeline stages hold of tied weights, equal bit for bit."""

    shape: tuple[int, ...]
    tilings: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True)
class RankGroup:
    """The parameters of one flat group (None: kept whole) as one rank's file lists them: name -> shape there.

    `slices` (ZeRO 1, 2): name -> start and length in the rank's part; `rank` of `ranks`: place among those that share
    the group (ZeRO 3).
    """

    index: int | None
    shapes: Mapping[str, tuple[int, ...]]
    slices: Mapping[str, tuple[int, int]] | None
    rank: int
    ranks: int


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote. `ep_rank`: which experts it holds."""

    file: str
    ep_rank: int
    groups: tuple[RankGroup, ...]


def plan(stages: Iterable[Iterable[RankFile]], ep_size: int) -> dict[str, LogicalTensor]:
    """Where every parameter's elements are, from what the ranks of each stage wrote. Pure.

    Raises CheckpointError where pieces are missing, overlap or contradict each other.
    """
    found: dict[str, tuple[tuple[int, ...], list[tuple[Piece, ...]]]] = {}
    for stage in stages:
        pieces: dict[str, list[Piece]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        progress: dict[tuple[str, int], int] = {}
        for rank_file in stage:
            for group in rank_file.groups:
                for name, local, piece in _pieces_of(rank_file, group, progress):
                    cut = is_expert(name) and ep_size > 1
                    shape = (local[0] * ep_size, *local[1:]) if cut else local
                    if shapes.setdefault(name, shape) != shape:
                        raise DamagedCheckpointError(
                            f"{rank_file.file}: {name} is {shape}, {shapes[name]} in another file"
                        )
                    offset = piece.offset + (rank_file.ep_rank * prod(local) if cut else 0)
                    pieces.setdefault(name, []).append(Piece(offset, piece.numel, piece.file, piece.group, piece.start))
        for name, parts in pieces.items():
            tiling = _tile(name, prod(shapes[name]), parts)
            shape, tilings = found.setdefault(name, (shapes[name], []))
            if shape != shapes[name]:
                raise DamagedCheckpointError(f"{name}: stages disagree on its shape, {shape} and {shapes[name]}")
            tilings.append(tiling)
    return {name: LogicalTensor(shape, tuple(tilings)) for name, (shape, tilings) in found.items()}


def _pieces_of(
    rank_file: RankFile, group: RankGroup, progress: dict[tuple[str, int], int]
) -> Iterator[tuple[str, tuple[int, ...], Piece]]:
    """Pieces of one rank's group, with offsets in the rank's local tensor. `progress`: elements of a parameter that
    lower ranks hold, which is where this rank's slice of it begins (ZeRO 1 and 2); ranks must come in order."""
    start = 0
    for name, shape in group.shapes.items():
        numel = prod(shape)
        if group.slices is None:
            part = -(-numel // group.ranks)
            offset = min(group.rank * part, numel)
            here = min(part, numel - offset)
            if here:
                yield name, shape, Piece(offset, here, rank_file.file, group.index, start)
            start += part
        elif name in group.slices:
            first, length = group.slices[name]
            key = name, rank_file.ep_rank if is_expert(name) else 0
            offset = progress.get(key, 0)
            progress[key] = offset + length
            yield name, shape, Piece(offset, length, rank_file.file, group.index, first)


def _tile(name: str, numel: int, pieces: list[Piece]) -> tuple[Piece, ...]:
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    end = 0
    for piece in ordered:
        if piece.offset != end:
            raise DamagedCheckpointError(
                f"{name}: element {min(end, piece.offset)} is in no file, or in two ({piece.file})"
            )
        end += piece.numel
    if end != numel:
        raise DamagedCheckpointError(f"{name}: {end} of {numel} elements are in the files")
    return tuple(ordered)


@cache
def _classes() -> list[Any]:
    """What DeepSpeed's files hold beside tensors and plain values. Imported when a file is first read: what converts
    safetensors runs without DeepSpeed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: Any) -> Any:
        """Stands for getattr, by which Python 3.11.0 to 3.11.3 pickle the members of an enum; it gets nothing else."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError("Unsupported global: getattr was not an allowed global")
        return ZeroStageEnum[name]

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]


def load_deepspeed_file(path: Path, *, mapped: bool = True, allow_pickle: bool | None = None) -> Any:
    """`safe_load` of a file that DeepSpeed wrote: its own four classes are allowed."""
    return safe_load(path, mapped=mapped, classes=_classes(), allow_pickle=allow_pickle)


class ShardReader:
    """The contents of a checkpoint's files, mapped into memory; nothing is executed (see `safe_load`), unless
    `allow_pickle`."""

    def __init__(self, tag: Path, *, allow_pickle: bool | None = None):
        self.tag = tag
        self.allow_pickle = executes_pickles() if allow_pickle is None else allow_pickle
        self._open: dict[str, Any] = {}
        self.last = ""
        """The file that was asked for last."""

    @cached_property
    def training(self) -> dict[str, Any]:
        """The training section of the run's configuration."""
        path = self.tag / STATE
        return dict(read_state(self.tag).config["training"]) if path.is_file() else {}

    def order(self, content: Mapping[str, Any]) -> dict[str, int]:
        """Index of each parameter in an unpartitioned optimizer: the order in which `parameter_groups` takes them."""
        apart = self.training.get("injection_lr") is not None
        roles: dict[str, list[str]] = {}
        for name, tensor in _weights(content).items():
            if not self.is_frozen(name):
                roles.setdefault(role_of(name, tensor.dim(), injection_apart=apart).name, []).append(name)
        return {name: index for index, name in enumerate(name for members in roles.values() for name in members)}

    def is_frozen(self, name: str) -> bool:
        """Whether the run did not train the parameter."""
        return is_frozen(name, self.training.get("frozen") or ())

    def content(self, file: str) -> Any:
        """What torch saved in `file`."""
        self.last = file
        if file not in self._open:
            self._open[file] = load_deepspeed_file(self.tag / file, allow_pickle=self.allow_pickle)
        return self._open[file]

    def elements(self, piece: Piece, name: str, kind: str) -> Tensor:
        """The flat elements of a piece of the tensor `name`."""
        found = self.flat(piece.file, piece.group, name, kind).detach()[piece.start : piece.start + piece.numel]
        if found.numel() != piece.numel or not found.dtype.is_floating_point:
            raise DamagedCheckpointError(
                f"{self.tag / piece.file}: {kind} of {name} has {found.numel()} elements of {found.dtype}; "
                f"{piece.numel} floating-point numbers are planned"
            )
        return found

    def flat(self, file: str, group: int | None, name: str, kind: str) -> Tensor:
        """The flat tensor that a piece is cut from. Raises CheckpointError where there is none of that kind."""
        content = self.content(file)
        try:
            if group == FROZEN and kind == WEIGHTS:
                return _frozen(content)[name].reshape(-1)
            if group is None:
                masters, states = _whole_states(content)
                if kind != WEIGHTS:
                    return states[self.order(content)[name]][kind].reshape(-1)
                return (masters[self.order(content)[name]] if masters else content["module"][name]).reshape(-1)
            state = content["optimizer_state_dict"]
            if kind == WEIGHTS:
                return _first(state, "fp32_flat_groups", "single_partition_of_fp32_groups")[group].reshape(-1)
            return _first(state, "optimizer_state_dict", "base_optimizer_state")["state"][group][kind].reshape(-1)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{self.tag / file}: has no {kind} of {name} ({error!r})") from None

    def kinds(self, file: str, group: int | None, name: str) -> dict[str, float | None]:
        """Optimizer states kept for a parameter; for `step`, its value."""
        if group == FROZEN:
            return {}
        content = self.content(file)
        if group is None:
            state = _whole_states(content)[1].get(self.order(content).get(name, -1), {})
        else:
            state = _first(content["optimizer_state_dict"], "optimizer_state_dict", "base_optimizer_state")
            state = state["state"].get(group, {})
        return {kind: float(value) if kind == STEP else None for kind, value in state.items() if value is not None}


def _first(state: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in state:
            return state[name]
    raise KeyError(names[0])


def _whole_states(content: Mapping[str, Any]) -> tuple[list[Tensor], Mapping[int, Any]]:
    """fp32 weights, where the module's are not, and states of an unpartitioned optimizer, in `_order`."""
    optimizer = content["optimizer"]
    masters = [master for group in optimizer.get("fp32_groups", ()) for master in group]
    return masters, optimizer.get("optimizer_state_dict", optimizer)["state"]


def _weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters among what the module holds, a tied head only once."""
    buffers = set(content["buffer_names"])
    module = {name: tensor for name, tensor in content["module"].items() if name not in buffers}
    head, embed = module.get("lm_head.weight"), module.get("embed.weight")
    if head is not None and embed is not None and head.data_ptr() == embed.data_ptr():
        del module["lm_head.weight"]
    return module


def _frozen(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Where frozen weights lie: ZeRO-3 keeps its ranks' parts of them apart from the module."""
    parts: Mapping[str, Tensor] | None = content.get("frozen_param_fragments")
    return content["module"] if parts is None else parts


class CheckpointTensors:
    """One kind of tensors of a training checkpoint, whole, in fp32: a TensorSource. `WEIGHTS` include the buffers.

    The kinds of one checkpoint share a plan: see `open_checkpoint`.
    """

    def __init__(
        self, tag: Path, kind: str, tensors: dict[str, LogicalTensor], buffers: dict[str, tuple[str, TensorSpec]]
    ):
        self.tag, self.kind, self.tensors, self.buffers = tag, kind, tensors, buffers
        self._reader = ShardReader(tag)

    def __getstate__(self) -> dict[str, Any]:
        # With the manifest, two checkpoints of one name are not taken for each other when a conversion goes on.
        manifest = self.tag / MANIFEST
        own = {"tag": self.tag, "kind": self.kind, "tensors": self.tensors, "buffers": self.buffers}
        content = read_bytes(manifest) if manifest.is_file() else None
        return {**own, "allow_pickle": self._reader.allow_pickle, "manifest": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tag, self.kind, self.tensors, self.buffers = (
            state[name] for name in ("tag", "kind", "tensors", "buffers")
        )
        self._reader = ShardReader(self.tag, allow_pickle=state["allow_pickle"])

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the kind."""
        specs = {name: TensorSpec(torch.float32, tensor.shape) for name, tensor in self.tensors.items()}
        return {**specs, **{name: spec for name, (_, spec) in self.buffers.items()}}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or some of its rows. Raises CheckpointError where copies of a tied weight differ."""
        if name in self.buffers:
            whole = self._reader.content(self.buffers[name][0])["module"][name]
            return whole.clone() if rows is None else whole[rows].clone()
        shape = self.tensors[name].shape
        if rows is not None:
            per_row = prod(shape[1:])
            return self.elements(name, rows.start * per_row, rows.stop * per_row).view(-1, *shape[1:])
        return self.elements(name, 0, prod(shape)).view(shape)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor, fp32."""
        first, *copies = (self._gather(tiling, name, start, stop) for tiling in self.tensors[name].tilings)
        if any(not torch.equal(first, copy) for copy in copies):
            raise DamagedCheckpointError(f"{self.tag}: the pipeline stages' copies of {name} ({self.kind}) differ")
        return first

    def _gather(self, tiling: tuple[Piece, ...], name: str, start: int, stop: int) -> Tensor:
        result = torch.empty(stop - start, dtype=torch.float32)
        for piece in tiling:
            low, high = max(start, piece.offset), min(stop, piece.offset + piece.numel)
            if low < high:
                held = self._reader.elements(piece, name, self.kind)
                result[low - start : high - start] = held[low - piece.offset : high - piece.offset]
        return result


def open_checkpoint(tag: Path, ep_size: int, n_stages: int) -> tuple[dict[str, CheckpointTensors], float]:
    """Kind -> its tensors, for the weights and each optimizer state of a DeepSpeed checkpoint, and the optimizer's
    step count. Raises CheckpointError where files are missing, do not fit together, or have another form."""
    reader = ShardReader(tag)
    try:
        return _opened(reader, ep_size, n_stages)
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DamagedCheckpointError(
            f"{tag / reader.last}: not of the form that DeepSpeed writes ({error!r})"
        ) from error


def _opened(reader: ShardReader, ep_size: int, n_stages: int) -> tuple[dict[str, CheckpointTensors], float]:
    tag, stages, buffers = reader.tag, [], {}
    for stage in range(n_stages):
        folder = Path(f"stage_{stage}") if n_stages > 1 else Path()
        files = _rank_files(reader, folder, ep_size)
        stages.append(files)
        buffers.update(_buffers(reader, folder))
    tensors = plan(stages, ep_size)
    by_kind: dict[str, dict[str, LogicalTensor]] = {WEIGHTS: tensors}
    steps = set()
    for name, tensor in tensors.items():
        piece = tensor.tilings[0][0]
        for kind, value in reader.kinds(piece.file, piece.group, name).items():
            if value is not None:
                steps.add(value)
            else:
                by_kind.setdefault(kind, {})[name] = tensor
    if len(steps) > 1:
        raise DamagedCheckpointError(f"{tag}: its parameters have been updated {sorted(steps)} times")
    own_buffers = {WEIGHTS: buffers}
    sources = {kind: CheckpointTensors(tag, kind, own, own_buffers.get(kind, {})) for kind, own in by_kind.items()}
    return sources, steps.pop() if steps else 0.0


def _rank_files(reader: ShardReader, folder: Path, ep_size: int) -> list[RankFile]:
    paths = sorted((reader.tag / folder).glob("*zero_pp_rank_*_optim_states.pt"), key=_dp_rank)
    if not paths:
        return [_whole_file(reader, str(folder / "mp_rank_00_model_states.pt"))]
    if [_dp_rank(path) for path in paths] != list(range(len(paths))):
        raise DamagedCheckpointError(f"{reader.tag / folder}: the files of some ranks are missing")
    layouts = [RankLayout(rank, (len(paths),), run_ep_size=ep_size) for rank in range(len(paths))]
    found = zip(paths, layouts, strict=True)
    return [file for path, layout in found for file in _rank_file(reader, path, layout)]


def _rank_file(reader: ShardReader, path: Path, layout: RankLayout) -> list[RankFile]:
    """What a rank wrote: of the optimizer, and of the frozen weights."""
    rank, file = layout.dp_rank, str(path.relative_to(reader.tag))
    own = path.with_name(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    model_states = own if own.is_file() else path.with_name("mp_rank_00_model_states.pt")
    model_file = str(model_states.relative_to(reader.tag))
    # What is wrong in a file is told of the one that was asked for last: each is asked for where it is looked into.
    shapes = [
        {name: tuple(shape) for name, shape in each.items()} for each in reader.content(model_file)["param_shapes"]
    ]
    states = reader.content(file)["optimizer_state_dict"]
    groups = []
    places = states.get("ds_zero_partition_groups")  # None where no weight is expert-parallel
    for index, local in enumerate(shapes):
        slices: Mapping[str, tuple[int, int]] | None = None
        if "param_slice_mappings" in states:
            slices = {name: (part.start, part.numel) for name, part in states["param_slice_mappings"][index].items()}
            place = 0, 0
        elif places is None:
            place = rank, states["partition_count"]
        else:
            place = places[index]["partition_rank"], places[index]["partition_count"]
        groups.append(RankGroup(index, local, slices, *place))
    rank_file = RankFile(file, layout.ep_rank, tuple(groups))
    cut = "param_slice_mappings" not in states
    frozen = _frozen_groups(reader, reader.content(model_file), layout, cut=cut)
    return [rank_file, RankFile(model_file, layout.ep_rank, tuple(frozen))]


def _frozen_groups(
    reader: ShardReader, content: Mapping[str, Any], layout: RankLayout, *, cut: bool
) -> Iterator[RankGroup]:
    """The frozen weights in a rank's file of the model, each by itself: its parts of them where ZeRO-3 has `cut` them,
    else whole, as every rank has them; then the first rank's count."""
    if cut:
        for name, shape in (content.get("frozen_param_shapes") or {}).items():
            yield RankGroup(FROZEN, {name: tuple(shape)}, None, layout.dp_rank, layout.dp_size)
    elif layout.dp_rank == 0:
        for name, tensor in _weights(content).items():
            if reader.is_frozen(name):
                yield RankGroup(FROZEN, {name: tuple(tensor.shape)}, {name: (0, tensor.numel())}, 0, 1)


def _whole_file(reader: ShardReader, file: str) -> RankFile:
    """ZeRO 0: every tensor under its name, on every rank the same."""
    content = reader.content(file)
    groups, trained = [], reader.order(content)
    for name, tensor in _weights(content).items():
        whole = {name: (0, tensor.numel())}
        groups.append(RankGroup(None if name in trained else FROZEN, {name: tuple(tensor.shape)}, whole, 0, 1))
    return RankFile(file, 0, tuple(groups))


def _buffers(reader: ShardReader, folder: Path) -> dict[str, tuple[str, TensorSpec]]:
    """Buffers of a stage, which all of its ranks hold alike. Raises CheckpointError where they differ."""
    found: dict[str, tuple[str, TensorSpec]] = {}
    for path in sorted((reader.tag / folder).glob("*mp_rank_00_model_states.pt")):
        if path.name.startswith("layer_"):
            continue  # the experts' copies that DeepSpeed keeps beside ZeRO 1 and 2
        file = str(path.relative_to(reader.tag))
        content = reader.content(file)
        for name in content["buffer_names"]:
            tensor = content["module"][name]
            first = found.setdefault(name, (file, TensorSpec(tensor.dtype, tuple(tensor.shape))))
            if not torch.equal(reader.content(first[0])["module"][name], tensor):
                raise DamagedCheckpointError(f"{path}: its {name} differs from that of another rank")
    return found


def _dp_rank(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])
