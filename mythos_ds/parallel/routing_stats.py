"""Routing counts and statistics of an optimizer step over all ranks, and the router bias they move.

A forward writes its notes per layer and loop and closes them; they are read once per micro-batch. Rows of layers that
live on other pipeline stages are zero here, so that one sum over all ranks serves every layout.
"""

import torch
from torch import Tensor

from mythos_ds.config.schema import ModelConfig
from mythos_ds.model.forward_stats import ForwardRecords, RoutingRecord, load_imbalance
from mythos_ds.model.moe import MoE
from mythos_ds.model.router import update_router_bias
from mythos_ds.parallel.groups import ParallelGroups

Statistics = dict[str, float | list[float]]

_AUXILIARY_FIELDS = ("balance", "z")
_OVERLAP = "overlap_previous"
_DETAIL_FIELDS = ("entropy", _OVERLAP)


class StepRecords:
    """Sums of the micro-batches' notes of one step of n_loops loops, in float64 (counts stay exact)."""

    def __init__(self, model: ModelConfig, n_loops: int, *, details: bool, auxiliary: bool, device: torch.device):
        self.micro_batches = 0
        self.layers = model.recurrent_layers
        self.fields = (_AUXILIARY_FIELDS if auxiliary else ()) + (_DETAIL_FIELDS if details else ())
        self.details = details
        shapes: dict[str, tuple[int, ...]] = {"counts": (self.layers, n_loops, model.n_experts)}
        shapes |= {field: (n_loops,) for field in (*self.fields, "begun")}
        if details:
            shapes |= {"prebias_counts": shapes["counts"], "state_rms": (n_loops,), "residual": (n_loops,), "rho_A": ()}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def add(self, records: ForwardRecords) -> None:
        """Reads the notes of one micro-batch; those of all layers and loops at once, as each is a kernel launch by
        itself. The layers held here follow one another."""
        self.micro_batches += 1
        begun = self._begun(records)
        self.sums["begun"] += begun
        if not records.lanes:
            self._add_routing(records, begun)
        for lane in records.lanes:
            self._add_routing(lane, self._begun(lane) / len(records.lanes))
        if records.loops:
            states = [records.loops[loop] for loop in range(len(begun))]
            self.sums["state_rms"] += torch.stack([state.state_rms for state in states]) * begun
            self.sums["residual"] += torch.stack([state.residual for state in states]) * begun
        if records.decay_maximum is not None:
            self.sums["rho_A"] += records.decay_maximum

    def _begun(self, records: ForwardRecords) -> Tensor:
        """The part of the sequences that run in each loop."""
        begun = torch.ones_like(self.sums["begun"])
        if records.depths is not None:
            begun = torch.stack([records.depths.begun(loop).double().mean() for loop in range(len(begun))])
        return begun

    def _add_routing(self, records: ForwardRecords, begun: Tensor) -> None:
        """Adds counts, and means over sequences of which a part `begun` of the micro-batch's counts in each loop."""
        notes = {layer: [by_loop[loop] for loop in range(len(begun))] for layer, by_loop in records.routing.items()}
        if not notes:
            return
        self._add_counts("counts", notes)
        if self.details:
            self._add_counts("prebias_counts", notes)
        self._add_means([field for field in self.fields if field != _OVERLAP], notes, begun)
        if self.details:  # loop 0 overlaps with nothing; an overlap counts where its earlier loop has begun
            later = {layer: by_loop[1:] for layer, by_loop in notes.items()}
            self._add_means([_OVERLAP], later, begun[:-1])

    def _add_counts(self, name: str, notes: dict[int, list[RoutingRecord]]) -> None:
        """Adds the layers' counts of each loop: [n_experts], or [n_loops, n_experts] where sequences have own loops."""
        stacked = torch.stack([getattr(note, name) for by_loop in notes.values() for note in by_loop]).double()
        by_layer = stacked.unflatten(0, (len(notes), -1))
        self.sums[name][min(notes) : max(notes) + 1] += by_layer if by_layer.dim() == 3 else by_layer.sum(1)

    def _add_means(self, fields: list[str], notes: dict[int, list[RoutingRecord]], begun: Tensor) -> None:
        """Adds scalars of each loop, averaged over all layers of the model, to the sums of the last len(begun) loops.
        Notes whose loops are none add nothing."""
        if not fields or not len(begun):
            return
        values = [getattr(note, field) for field in fields for by_loop in notes.values() for note in by_loop]
        by_field = torch.stack(values).double().view(len(fields), len(notes), -1).sum(1) / self.layers * begun
        for field, own in zip(fields, by_field, strict=True):
            self.sums[field][-len(begun) :] += own

    def reduce(self, groups: ParallelGroups) -> None:
        """Sums everything over all ranks, in one all-reduce, and brings it to the CPU: the one wait for the device."""
        flat = groups.all_reduce(torch.cat([value.flatten() for value in self.sums.values()])).cpu()
        parts = flat.split([value.numel() for value in self.sums.values()])
        self.sums = {name: part.view_as(self.sums[name]) for name, part in zip(list(self.sums), parts, strict=True)}
        self.sums["begun"] /= self.micro_batches * groups.world_size

    @property
    def counts(self) -> Tensor:
        """float64 [n_layers, n_loops, n_experts]: tokens per layer, loop and expert."""
        return self.sums["counts"]

    def statistics(self, n_ranks: int) -> Statistics:
        """Metrics of the reduced sums; `n_ranks` processes hold each layer. Lists have one entry per loop; several
        layers are averaged, imbalances are the worst layer's. With a depth per sequence, expert loads are by the
        sequences' own loop index, and the other lists by the step's, over the sequences that have begun."""
        samples = self.micro_batches * n_ranks
        begun = self.sums["begun"]
        values: Statistics = {
            "router/load_max_mean": load_imbalance(self.counts.sum(1)).max().item(),
            "router/load_max_mean_per_loop": load_imbalance(self.counts).amax(0).tolist(),
        }
        means = {field: (self.sums[field] / samples / begun).tolist() for field in self.fields}
        if "balance" in means:
            values["loss/balance"] = sum(means["balance"]) / len(means["balance"])
            values["loss/router_z"] = sum(means["z"]) / len(means["z"])
        if not self.details:
            return values
        prebias = self.sums["prebias_counts"]
        shares = prebias / prebias.sum(-1, keepdim=True)
        values["router/prebias_max_share_per_loop"] = shares.amax((0, 2)).tolist()
        values["router/entropy_per_loop"] = means["entropy"]
        values["router/overlap_per_loop"] = (self.sums["overlap_previous"][1:] / samples / begun[:-1]).tolist()
        values["state/rms_per_loop"] = (self.sums["state_rms"] / samples / begun).tolist()
        values["state/residual_per_loop"] = (self.sums["residual"] / samples / begun).tolist()
        values["state/rho_A"] = (self.sums["rho_A"] / samples).item()
        return values


def update_biases(layers: list[MoE], counts: Tensor, rate: float) -> None:
    """Moves the selection bias of each of `layers` once. counts [n_layers, n_loops, n_experts] are those of the whole
    model and must be the same on all ranks."""
    counts = counts.to(layers[0].router.bias.device) if layers else counts
    for layer in layers:
        update_router_bias(layer.router, counts[layer.layer], rate)


def largest_bias(layers: list[MoE]) -> float:
    """Largest absolute selection bias of any of `layers`; 0 for none."""
    return torch.stack([layer.router.bias.abs().max() for layer in layers]).max().item() if layers else 0.0
