"""Commands of vLLM that serve an exported folder on the GPUs of one node or of several.

Tensor parallelism stays inside a node. Over nodes, attention has data-parallel replicas and experts are spread over all
GPUs, by vLLM's own processes ("mp"): node 0 answers requests and hands them to the replicas of all nodes; the other
nodes only compute. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.serving import Division, misfit
from mythos_ds.errors import OptionError

RPC_PORT = 29_550
"""Where node 0 meets the others; vLLM's own default."""
OVERRIDES = "--hf-overrides"
OWN_FLAGS = {
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp",
    "--data-parallel-size-local", "-dpl", "--data-parallel-address", "-dpa", "--data-parallel-rpc-port", "-dpp",
    "--data-parallel-rank", "-dpn", "--data-parallel-start-rank", "-dpr", "--enable-expert-parallel", "-ep",
    "--no-enable-expert-parallel",    "--nnodes", "-n", "--node-rank", "-r", "--headless", "--host", "--port",
}  # fmt: skip
"""Flags of vLLM, by their names in 0.32, for which this command has options, or that it has no use for."""
_LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")
_PORTS = 65_535


@dataclass(frozen=True)
class VllmServer:
    """One server.

    Attributes:
        folder: the exported folder, by a path that every node has.
        gpus: of each node.
        tensor: tensor-parallel ranks of a replica, all on one node.
        experts: "whole", spread over all GPUs, or "divided", each among all GPUs.
        address: of node 0, for the other nodes; None on one node.
        rpc_port: of node 0, for the other nodes.
        host: where node 0 answers requests, at `port`.
        n_loops: of the server; None for the folder's.
        further: flags that vLLM gets as they are, on each node.
    """

    folder: str
    nodes: int = 1
    gpus: int = 1
    tensor: int = 1
    experts: Literal["whole", "divided"] = "whole"
    address: str | None = None
    rpc_port: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    n_loops: int | None = None
    further: Sequence[str] = ()

    @property
    def division(self) -> Division:
        """Of the model among all GPUs."""
        return Division(self.tensor, self.nodes * self.gpus // self.tensor, self.experts)

    def check(self) -> None:
        """Raises OptionError for sizes, addresses and ports that do not go together."""
        for name, given in (("nodes", self.nodes), ("gpus", self.gpus), ("tensor", self.tensor)):
            if given < 1:
                raise OptionError(f"--{name}: given {given}; allowed: 1 or more; nearest: 1")
        if self.gpus % self.tensor:
            sizes = [size for size in range(1, self.gpus + 1) if self.gpus % size == 0]
            nearest = min(sizes, key=lambda size: abs(size - self.tensor))
            allowed = f"allowed: divisors of a node's {self.gpus} GPUs"
            raise OptionError(f"--tensor: given {self.tensor}; {allowed}, the rest are replicas; nearest: {nearest}")
        if self.n_loops is not None and self.n_loops < 1:
            raise OptionError(f"--loops: given {self.n_loops}; allowed: 1 or more; nearest: 1")
        if self.experts == "divided" and self.nodes * self.gpus == 1:
            raise OptionError("--experts: given divided for one GPU; allowed: with more of them")
        self._check_network()
        for word in self.further:
            flag = word.partition("=")[0].replace("_", "-")
            looped = self.n_loops is not None and flag.partition(".")[0] == OVERRIDES
            shortened = flag.startswith("--") and any(own.startswith(flag) for own in OWN_FLAGS)
            if flag in OWN_FLAGS or shortened or looped:
                raise OptionError(f"{flag}: given after --; allowed: this command's own options, which set it")

    def _check_network(self) -> None:
        for name, port in (("port", self.port), ("rpc-port", self.rpc_port)):
            if port is not None and not 1 <= port <= _PORTS:
                raise OptionError(
                    f"--{name}: given {port}; allowed: 1 to {_PORTS}; nearest: {1 if port < 1 else _PORTS}"
                )
        if self.nodes == 1:
            given = [name for name in ("address", "rpc_port") if getattr(self, name) is not None]
            if given:
                raise OptionError(
                    f"--{given[0].replace('_', '-')}: given for one node; allowed: with --nodes of 2 or more"
                )
            return
        if self.address is None:
            raise OptionError(f"--address: missing; needed for {self.nodes} nodes: node 0, as the others reach it")
        if self.address.startswith(_LOOPBACK):
            raise OptionError(f"--address: given {self.address}; allowed: a name or address that other nodes reach")
        if self.port == (self.rpc_port or RPC_PORT):
            raise OptionError(
                f"--port: given {self.port}, where the nodes meet; allowed: another; nearest: {self.port + 1}"
            )

    def check_model(self, model: ModelConfig, *, fp8: bool) -> None:
        """Raises OptionError where the GPUs cannot divide the folder's model. fp8: whether its blocks stay."""
        sizes = [size for size in range(1, self.gpus + 1) if self.gpus % size == 0 and self._fits(model, size, fp8)]
        if self.division.gpus > model.n_experts and self.experts == "whole":
            given = f"--nodes {self.nodes} --gpus {self.gpus}: given"
            raise OptionError(f"{given}; allowed: at most {model.n_experts} GPUs, so that each has an expert")
        if self.tensor in sizes:
            return
        why = misfit(model, self.division, fp8=fp8)
        allowed = ", ".join(map(str, sizes)) or "none"
        nearest = f"; nearest: {min(sizes, key=lambda size: abs(size - self.tensor))}" if sizes else ""
        raise OptionError(f"--tensor: given {self.tensor}; allowed: {allowed} ({why}){nearest}")

    def _fits(self, model: ModelConfig, tensor: int, fp8: bool) -> bool:
        division = Division(tensor, self.nodes * self.gpus // tensor, self.experts)
        return misfit(model, division, fp8=fp8) is None

    def command(self, node: int) -> list[str]:
        """The words of the command that node `node` runs."""
        return ["vllm", "serve", self.folder, *self._flags(node), *self.further]

    def _flags(self, node: int) -> list[str]:
        division, flags = self.division, []
        if division.tensor > 1:
            flags += ["--tensor-parallel-size", str(division.tensor)]
        if division.data > 1:
            flags += ["--data-parallel-size", str(division.data)]
        if division.gpus > 1 and self.experts == "whole":
            flags.append("--enable-expert-parallel")
        if self.nodes > 1:
            local = division.data // self.nodes
            flags += ["--data-parallel-size-local", str(local), "--data-parallel-address", str(self.address)]
            flags += ["--data-parallel-rpc-port", str(self.rpc_port or RPC_PORT)]
            flags += ["--headless", "--data-parallel-start-rank", str(node * local)] if node else []
        if self.n_loops is not None:
            flags += [OVERRIDES, f'{{"n_loops": {self.n_loops}}}']
        return flags if node else [*flags, "--host", self.host, "--port", str(self.port)]


def widest(model: ModelConfig, server: VllmServer, *, fp8: bool) -> int:
    """The largest tensor-parallel size that divides a node's GPUs and that the model allows; 1 where none does."""
    sizes = [size for size in range(1, server.gpus + 1) if server.gpus % size == 0]
    return max((size for size in sizes if server._fits(model, size, fp8)), default=1)
