"""Throughput, model FLOP utilisation and the routing numbers of a step, as plain values for the metrics file."""

import time
from dataclasses import dataclass

import torch

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.flops import flops_per_token
from mythos_ds.hardware import peak_bf16

_PROBE_SIZE = 1024
_PROBE_SECONDS = 0.2


def gpu_name() -> str | None:
    """The name of this process's GPU; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one process: the data sheet's for a known GPU in bf16, else measured by a matrix product; None on
    a CPU, whose cores other processes share."""
    if device.type == "cpu":
        return None
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = peak_bf16(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product within `_PROBE_SECONDS`, with the process's own threads."""
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_SECONDS or best == 0.0:
        before = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * _PROBE_SIZE**3 / (time.perf_counter() - before))
    return best


@dataclass
class Throughput:
    """Tokens and model FLOPs since the last reading.

    Model FLOPs are those of the loops that each step ran with truncated backpropagation, without recomputation, so that
    utilisation does not reward recomputing. With a depth per sequence they contain loops of sequences not yet begun.
    """

    resolved: ResolvedRun
    peak_flops_per_rank: float | None
    _tokens: int = 0
    _flops: float = 0.0
    _seconds: float = 0.0

    def add(self, n_loops: int, seconds: float, sequences: int) -> None:
        """Count one optimizer step of `n_loops` loops over `sequences` that took `seconds`."""
        config = self.resolved.config
        cost = flops_per_token(
            config.model,
            context=config.training.seq_len,
            n_loops=n_loops,
            n_grad_loops=self.resolved.mean_backprop_depth,
        )
        tokens = sequences * config.training.seq_len
        self._tokens += tokens
        self._flops += tokens * cost.training
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """tokens_per_second over all ranks, and mfu (0..1) where the peak is known, since the last reading; starts a
        new one."""
        seconds = max(self._seconds, 1e-9)
        values = {"tokens_per_second": self._tokens / seconds}
        if self.peak_flops_per_rank is not None:
            values["mfu"] = self._flops / seconds / (self.peak_flops_per_rank * self.resolved.world_size)
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        return values
