"""Routing counts and statistics of an optimizer step over all ranks, and the router bias they move.

A forward writes its records per loop; they are read once after each micro-batch's backward. Recomputation in the
backward has then written the same values again, so nothing counts twice.
"""

import torch
from torch import Tensor

from mythos_ds.errors import ParallelError
from mythos_ds.model.moe import MoE
from mythos_ds.model.mythos import MythosModel
from mythos_ds.model.records import RoutingRecord, load_imbalance
from mythos_ds.model.router import Router, update_router_bias
from mythos_ds.parallel.groups import ParallelGroups

Statistics = dict[str, float | list[float]]

_PER_LOOP_FIELDS = ("balance", "z", "entropy", "overlap_previous")


class StepRecords:
    """Sums of the micro-batches' records of one step, in float64 (counts stay exact)."""

    def __init__(self) -> None:
        self.micro_batches = 0
        self.sums: dict[str, Tensor] = {}
        self.decay_maximum: float | None = None

    def add(self, model: MythosModel) -> None:
        """Reads the records of the micro-batch just run."""
        self.micro_batches += 1
        layers = model.moe_layers()
        self._add("counts", torch.stack([_per_loop(layer, "counts") for layer in layers]))
        first = layers[0].records[0]
        if first.prebias_counts is not None:
            self._add("prebias_counts", torch.stack([_per_loop(layer, "prebias_counts") for layer in layers]))
        for field in _PER_LOOP_FIELDS:
            if any(getattr(record, field) is not None for record in layers[0].records.values()):
                self._add(field, torch.stack([_per_loop(layer, field) for layer in layers]).mean(0))
        self._add_loops(model)

    def _add_loops(self, model: MythosModel) -> None:
        loops = [record for _, record in sorted(model.recurrent.loop_records.items())]
        if not loops:
            return
        self._add("state_rms", torch.stack([record.state_rms for record in loops]))
        self._add("residual", torch.stack([record.residual for record in loops]))
        if model.recurrent.decay_maximum is not None:
            self.decay_maximum = float(model.recurrent.decay_maximum)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reduce(self, groups: ParallelGroups) -> None:
        """Sums everything over all ranks, in one all-reduce."""
        flat = groups.all_reduce(torch.cat([value.flatten() for value in self.sums.values()]))
        parts = flat.split([value.numel() for value in self.sums.values()])
        self.sums = {name: part.view_as(self.sums[name]) for name, part in zip(list(self.sums), parts, strict=True)}

    @property
    def counts(self) -> Tensor:
        """float64 [n_layers, n_loops, n_experts]: tokens per layer, loop and expert."""
        return self.sums["counts"]

    def statistics(self, n_ranks: int) -> Statistics:
        """Metrics of the reduced sums. Lists have one entry per loop; several layers are averaged, imbalances are the
        worst layer's."""
        samples = self.micro_batches * n_ranks
        values: Statistics = {
            "router/load_max_mean": load_imbalance(self.counts.sum(1)).max().item(),
            "router/load_max_mean_per_loop": load_imbalance(self.counts).amax(0).tolist(),
        }
        if "prebias_counts" in self.sums:
            prebias = self.sums["prebias_counts"]
            shares = prebias / prebias.sum(-1, keepdim=True)
            values["router/prebias_max_share_per_loop"] = shares.amax((0, 2)).tolist()
        for field, name in (("entropy", "router/entropy_per_loop"), ("state_rms", "state/rms_per_loop")):
            if field in self.sums:
                values[name] = (self.sums[field] / samples).tolist()
        if "overlap_previous" in self.sums:
            values["router/overlap_per_loop"] = (self.sums["overlap_previous"] / samples).tolist()[1:]
        if "residual" in self.sums:
            values["state/residual_per_loop"] = (self.sums["residual"] / samples).tolist()
        for field, name in (("balance", "loss/balance"), ("z", "loss/router_z")):
            if field in self.sums:
                values[name] = (self.sums[field] / samples).mean().item()
        if self.decay_maximum is not None:
            values["state/rho_A"] = self.decay_maximum
        return values


def _per_loop(layer: MoE, field: str) -> Tensor:
    """One field of a layer's records, [n_loops, ...]; zero where a loop has none (loop 0 overlaps with nothing)."""
    records: list[RoutingRecord] = [record for _, record in sorted(layer.records.items())]
    values: list[Tensor | None] = [getattr(record, field) for record in records]
    filler = torch.zeros_like(next(value for value in values if value is not None))
    return torch.stack([filler if value is None else value for value in values])


def update_biases(model: MythosModel, counts: Tensor, rate: float) -> None:
    """Moves each router's selection bias once. counts [n_layers, n_loops, n_experts] must be the same on all ranks."""
    for layer, own in zip(model.moe_layers(), counts, strict=True):
        update_router_bias(layer.router, own.to(layer.router.bias.device), rate)


def largest_bias(model: MythosModel) -> float:
    """Largest absolute selection bias of any layer."""
    return max(layer.router.bias.abs().max().item() for layer in model.moe_layers())


def restore_float_buffers(model: MythosModel, device: torch.device) -> None:
    """Gives the routers' buffers back their dtype and initial value.

    `zero.Init` with bf16 casts every tensor made under it, buffers too, and their values are lost; DeepSpeed's
    `keep_in_fp32_modules` brings back the dtype only. Raises ParallelError where a buffer that this function does not
    know of is not fp32.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        for name, buffer in list(router.named_buffers(recurse=False)):
            setattr(router, name, torch.zeros(buffer.shape, dtype=torch.float32, device=device))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise ParallelError(f"buffer {name} is {buffer.dtype}; the model's buffers must stay float32.")
