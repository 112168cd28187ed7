"""What a request may say of its loops, and what keeps a server from obeying it.

Plain rules: this file needs neither vLLM nor torch. A request names its loops as `vllm_xargs.n_loops`, which vLLM hands
on as `SamplingParams.extra_args`; without it a request runs the server's.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME = "n_loops"
EXPERIMENTAL = "mythos_experimental_loops"
"""The key of vLLM's `--additional-config` that lets the second model runner take loops per request."""
TAKES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""The routes whose requests reach the model with their `vllm_xargs`."""
_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id")
"""Arguments that vLLM itself reads or writes."""


@dataclass(frozen=True)
class LoopServer:
    """A server as its requests see it: its loops, why it takes no others, and whether it has logits processors, which
    may read arguments of their own."""

    n_loops: int
    obstacles: tuple[str, ...] = ()
    logits_processors: bool = False


def obstacles(
    *,
    second_runner: bool,
    experimental: bool,
    own_worker: bool,
    worker: str,
    graphs: bool,
    data_parallel: int,
    microbatches: bool,
    speculative: bool,
    connector: bool,
) -> tuple[str, ...]:
    """Say what keeps a server from running each request's own loops; nothing for one that does.

    Args:
        second_runner: vLLM runs its second model runner (V2), not the first (V1).
        experimental: the option EXPERIMENTAL is set.
        own_worker: the worker is the plugin's, which hands on the loops of the first runner.
        worker: the worker's name.
        graphs: the model is captured in CUDA graphs or compiled as a whole.
        data_parallel: processes that share the experts' batches.
        microbatches: a batch is cut in two.
        speculative: a draft proposes tokens.
        connector: keys and values come from other servers, or go there.
    """
    found = []
    if second_runner and not experimental:
        option = f"--additional-config '{{\"{EXPERIMENTAL}\": true}}'"
        found.append(
            f"vLLM's second model runner takes it with {option} only, which is experimental and has never run on a "
            "GPU; the first runner (VLLM_USE_V2_MODEL_RUNNER=0) takes it without"
        )
    if not second_runner and not own_worker:
        found.append(f"the worker is {worker}; allowed: the plugin's, which is chosen where --worker-cls is not given")
    if graphs:
        found.append("the model is compiled or in CUDA graphs, whose rows all run alike; allowed: --enforce-eager")
    if data_parallel > 1:
        found.append(f"--data-parallel-size {data_parallel}, whose processes loop together; allowed: 1")
    if microbatches:
        found.append("batches are cut into micro-batches; allowed: without --enable-dbo and --ubatch-size")
    if speculative:
        found.append("speculative decoding is on, which was not tried with it; allowed: without --speculative-config")
    if connector:
        found.append("keys and values are shared with other servers; allowed: without --kv-transfer-config")
    return tuple(found)


def requested_loops(arguments: Mapping[str, Any] | None, server: LoopServer) -> int:
    """Read the loops that a request runs from its `vllm_xargs`; the server's where it says nothing.

    Raises ValueError for a count that is none, is not from 1 to the server's, or that this server cannot run, and for
    an argument that nothing would read.
    """
    arguments = arguments or {}
    known = (NAME, *_OF_VLLM)
    unknown = sorted(str(name) for name in arguments if name not in known)
    if unknown and not server.logits_processors:
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        allowed = ", ".join(known)
        raise ValueError(f"vllm_xargs: given {unknown[0]!r:.60}, which nothing reads; allowed: {allowed}{hint}")
    if NAME not in arguments:
        return server.n_loops
    given = arguments[NAME]
    if type(given) is not int or not 1 <= given <= server.n_loops:
        nearest = _nearest(given, server.n_loops)
        raise ValueError(
            f"vllm_xargs.{NAME}: given {given!r:.60}; allowed: a whole number from 1 to {server.n_loops}, the server's "
            f"loops{'' if nearest is None else f'; nearest: {nearest}'}"
        )
    if server.obstacles:
        raise ValueError(f"vllm_xargs.{NAME}: given {given}, but on this server {'; '.join(server.obstacles)}")
    return given


def admitted_loops(sampling_params: Any, served: int) -> int:
    """The loops of a request that has passed `requested_loops`, by its sampling parameters (a pooling request has
    none)."""
    arguments = None if sampling_params is None else sampling_params.extra_args
    return (arguments or {}).get(NAME, served)


def check_request(path: str, body: Any, server: LoopServer) -> None:
    """Check the JSON body of a request over HTTP as it was sent: vLLM drops fields that it does not know, and reads
    true as 1.

    Raises ValueError as `requested_loops` does, for `n_loops` beside vllm_xargs, and for loops on a route or a search
    that would not hand them on.
    """
    if not isinstance(body, dict):
        return
    if NAME in body:
        raise ValueError(
            f"{NAME}: given as a field of the request, which vLLM drops; allowed: in vllm_xargs, as "
            f'"vllm_xargs": {{"{NAME}": {server.n_loops}}}'
        )
    arguments = body.get("vllm_xargs")
    if not isinstance(arguments, dict):
        return
    requested_loops(arguments, server)
    if NAME not in arguments:
        return
    if not path.endswith(TAKES):
        raise ValueError(f"vllm_xargs.{NAME}: given to {path}, which drops it; allowed: {', '.join(TAKES)}")
    if body.get("use_beam_search"):
        raise ValueError(f"vllm_xargs.{NAME}: given with use_beam_search, which drops it; allowed: without")


def salted(salt: str | None, loops: int) -> str:
    """Join the loops with the request's own salt of the prefix cache: requests of other depths never share blocks,
    whatever salts they bring."""
    return f"{loops}" if salt is None else f"{loops};{salt}"


def experimental_option(additional: Any, second_runner: bool) -> bool:
    """Read EXPERIMENTAL from vLLM's `--additional-config`.

    Raises ValueError unless it is true or false, and where it is true without the second runner.
    """
    value = additional.get(EXPERIMENTAL, False) if isinstance(additional, Mapping) else False
    if not isinstance(value, bool):
        raise ValueError(f"--additional-config {EXPERIMENTAL}: given {value!r}; allowed: true, false")
    if value and not second_runner:
        raise ValueError(
            f"--additional-config {EXPERIMENTAL}: given true, but it concerns vLLM's second model runner and this "
            "server has the first, which takes loops per request without it; allowed: false"
        )
    return value


def _nearest(given: Any, most: int) -> int | None:
    """The valid count nearest to one that is not."""
    if isinstance(given, bool):
        return None
    try:
        number = given if isinstance(given, int) else round(float(given))
        return min(max(number, 1), most)
    except (TypeError, ValueError, OverflowError):
        return None
