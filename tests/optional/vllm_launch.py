"""Whether vLLM's own parser takes what `mythos-ds serve-vllm` writes, and makes the ranks of it that are meant.

Runs in vLLM's environment with the package in it; starts no server:

    .cache/vllm/bin/python tests/optional/vllm_launch.py FOLDER      # an exported folder of models/tiny
"""

import argparse
import os
import sys
from pathlib import Path

from mythos_ds.cluster.vllm_server import OWN_FLAGS, VllmServer

SERVERS = [
    VllmServer(""),
    VllmServer("", gpus=4, tensor=4, port=8123),
    VllmServer("", gpus=4, tensor=2, experts="divided", n_loops=7),
    VllmServer("", gpus=2, tensor=1, further=("--max-model-len", "128")),
    VllmServer("", nodes=2, gpus=2, tensor=2, address="node0"),
    VllmServer("", nodes=2, gpus=4, tensor=2, address="node0", rpc_port=29_600, n_loops=2, host="0.0.0.0"),
    VllmServer(
        "", nodes=4, gpus=2, tensor=1, address="10.0.0.1", further=("--all2all-backend", "deepep_high_throughput")
    ),
]


def main(folder: Path) -> int:
    """Print a line for each node of each server; 1 where one differs."""
    import vllm
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    wrong = [f"{flag}: no flag of vLLM {vllm.__version__}" for flag in sorted(OWN_FLAGS - known)]
    for server in SERVERS:
        own = VllmServer(**{**vars(server), "folder": str(folder)})
        own.check()
        for node in range(own.nodes):
            words = own.command(node)
            arguments = parser.parse_args(words[2:])
            validate_parsed_serve_args(arguments)
            arguments.model = arguments.model_tag
            faults = differences(own, node, arguments, vllm.AsyncEngineArgs.from_cli_args(arguments))
            sys.stdout.write(f"{'as meant' if not faults else 'DIFFERS '} {' '.join(words)}\n")
            wrong += [f"{' '.join(words)}: {fault}" for fault in faults]
    sys.stdout.write("\n".join([*wrong, "" if wrong else "vLLM launch: every command is read as it is meant\n"]))
    return 1 if wrong else 0


def differences(server: VllmServer, node: int, arguments: argparse.Namespace, engine: object) -> list[str]:
    """What vLLM understands otherwise, of the configuration that a start would take."""
    made = engine.create_engine_config(headless=node > 0)  # type: ignore[attr-defined]
    parallel, division = made.parallel_config, server.division
    local = division.data // server.nodes
    meant: dict[str, object] = {
        "tensor_parallel_size": server.tensor,
        "data_parallel_size": division.data,
        "data_parallel_size_local": local,
        "data_parallel_rank": node * local,
        "enable_expert_parallel": server.experts == "whole" and division.gpus > 1,
        "data_parallel_external_lb": False,
        "data_parallel_hybrid_lb": False,
        "world_size": server.tensor,
    }
    if server.nodes > 1:
        meant |= {"data_parallel_master_ip": server.address, "data_parallel_rpc_port": server.rpc_port or 29_550}
    found = [f"{name} {getattr(parallel, name)}, not {value}" for name, value in meant.items()
             if getattr(parallel, name) != value]  # fmt: skip
    if server.n_loops not in (None, made.model_config.hf_config.n_loops):
        found.append(f"n_loops {made.model_config.hf_config.n_loops}, not {server.n_loops}")
    if arguments.headless != (node > 0) or (
        not node and (arguments.host, arguments.port) != (server.host, server.port)
    ):
        found.append("who answers requests")
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(Path(sys.argv[1])))
