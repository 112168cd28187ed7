"""Serve an exported folder on vLLM, on the GPUs of one node or of several. Runs in vLLM's environment.

    mythos-ds serve-vllm merged-hf                                        # one GPU, at 127.0.0.1:8000
    mythos-ds serve-vllm merged-hf --gpus 8                               # tensor parallel as far as the folder allows
    mythos-ds serve-vllm merged-hf --gpus 8 --tensor 1                    # eight replicas of attention, experts spread
    mythos-ds serve-vllm merged-hf --nodes 2 --gpus 8 --address node0 --dry-run
    mythos-ds serve-vllm merged-hf --nodes 2 --gpus 8 --address node0 --node 1 -- --max-model-len 32768

On several nodes the same line runs on each, with its own --node, and node 0 answers for all of them. What stands after
-- goes to `vllm serve` as it is. Nodes trust each other: docs/serving.md says what their network must be.
"""

import os
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

from mythos_ds.cluster.vllm_server import OVERRIDES, RPC_PORT, VllmServer, widest
from mythos_ds.config.schema import ModelConfig
from mythos_ds.conversion.huggingface import mythos_config
from mythos_ds.errors import OptionError, naming
from mythos_ds.io import read_json
from mythos_ds.mains import run_tool


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="an exported folder (convert --to hf), at the same path on each node")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus", type=int, default=1, help="of each node (default: 1)")
    made.add_argument("--tensor", type=int, help="tensor-parallel size (default: the largest that fits a node's GPUs)")
    made.add_argument("--experts", choices=("whole", "divided"), default="whole", help="on one GPU each, or over all")
    made.add_argument("--address", help="of node 0, as the other nodes reach it")
    made.add_argument("--rpc-port", type=int, help=f"of node 0, where the others come to (default: {RPC_PORT})")
    made.add_argument("--node", type=int, help="which node this is, from 0 (with several)")
    made.add_argument("--host", default="127.0.0.1", help="where requests are answered (default: this machine only)")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--loops", type=int, help="of the server (default: the folder's n_loops)")
    made.add_argument("--dry-run", action="store_true", help="print each node's command and run nothing")
    made.add_argument("further", nargs="*", metavar="-- flags", help="flags of vllm serve, as they are")
    return made


def work(arguments: Namespace) -> None:
    server = server_of(arguments)
    node = node_of(arguments)
    if arguments.dry_run:
        sys.stdout.write(script(server, range(server.nodes) if arguments.node is None else [node]))
        return
    program = find_vllm()
    if node == 0 and server.host not in ("127.0.0.1", "localhost", "::1") and "--api-key" not in server.further:
        sys.stderr.write(f"{server.host}:{server.port} answers everybody who reaches it; a key: -- --api-key KEY\n")
    sys.stdout.write(f"{shlex.join(server.command(node))}\n")
    sys.stdout.flush()
    os.execv(program, server.command(node))  # vLLM gets the signals


def server_of(arguments: Namespace) -> VllmServer:
    """The server that is asked for. Raises OptionError for one that there cannot be, CheckpointError for a folder that
    is none of ours."""
    taken = ("nodes", "gpus", "experts", "address", "rpc_port", "host", "port")
    options = {name: getattr(arguments, name) for name in taken}
    server = VllmServer(str(arguments.folder), **options, n_loops=arguments.loops, further=tuple(arguments.further))
    if arguments.tensor is not None:
        server = replace(server, tensor=arguments.tensor)
    server.check()
    model, fp8 = read_folder(arguments.folder)
    if any(word.partition("=")[0].partition(".")[0].replace("_", "-") == OVERRIDES for word in server.further):
        fp8 = False  # what the folder says is overridden: the plugin checks blocks when it starts
    if arguments.tensor is None:
        server = replace(server, tensor=widest(model, server, fp8=fp8))
    server.check_model(model, fp8=fp8)
    return server


def read_folder(folder: Path) -> tuple[ModelConfig, bool]:
    """The model of an exported folder, and whether its matrices are in fp8."""
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder}: no config.json; allowed: a folder that `mythos-ds convert --to hf` wrote")
    hf = read_json(folder / "config.json", dict)
    quantised = hf.get("quantization_config")
    with naming(folder):
        return mythos_config(hf), isinstance(quantised, dict) and quantised.get("quant_method") == "fp8"


def node_of(arguments: Namespace) -> int:
    """Which node this is. Raises OptionError where that is not said, or is none of them."""
    last = arguments.nodes - 1
    if arguments.node is None:
        if last and not arguments.dry_run:
            raise OptionError(f"--node: missing; needed for {arguments.nodes} nodes: 0 to {last}, or --dry-run")
        return 0
    if not 0 <= arguments.node <= last:
        nearest = 0 if arguments.node < 0 else last
        raise OptionError(f"--node: given {arguments.node}; allowed: 0 to {last}; nearest: {nearest}")
    return int(arguments.node)


def script(server: VllmServer, nodes: range | list[int]) -> str:
    """The commands of `nodes`, a comment before each."""
    lines = []
    for node in nodes:
        what = f"answers at http://{server.host}:{server.port}" if node == 0 else "computes"
        lines += [f"# node {node} of {server.nodes}: {what}", shlex.join(server.command(node))]
    return "\n".join([*lines, ""])


def find_vllm() -> str:
    """The program `vllm` beside this Python, else in the path. Raises OptionError where there is none."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None:
        raise OptionError(f"vllm: not beside {sys.executable} and not in PATH; allowed: an environment with vLLM in it")
    return found


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
