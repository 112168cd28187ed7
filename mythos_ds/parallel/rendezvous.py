"""How the processes of a run find each other before torch.distributed starts: where they do not, one message says who
is missing at which address, or who holds the port."""

import contextlib
import fcntl
import ipaddress
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_distributed

from mythos_ds import ports
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import ParallelError, ReportedElsewhere
from mythos_ds.log import get_logger
from mythos_ds.slurm_step import require_task

REACH_S = 300.0
"""What rank 0 may take to listen, counted from the start of another rank: both import the same."""
RESOLVE_S = 30.0
"""What a name server may take to know a new host."""
SELF_S = 15.0
NOTICE_S = 20.0
"""After it, whoever waits says so."""
_ATTEMPT_S, _PAUSE_S = 5.0, 0.25
_KEY = "mythos_ds"
_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address, which is then in these bytes of the answer."""
_ADDRESS = slice(20, 24)
_BEYOND = "203.0.113.1"
"""An address that no host has (RFC 5737); the way to it is a host's way to others. Nothing is sent there."""
_CONNECTIONS, _OTHER_FILES = 4, 1024
"""What a process opens for each other one, at the most (rank 0: its stores' and its host group's), and beside them."""
_SHOWN = 8

Result = TypeVar("Result")

_logger = get_logger(__name__)
_met: set[tuple[str, int]] = set()


def meet(env: ProcessEnvironment, limit_s: float) -> tuple[ProcessEnvironment, torch_distributed.Store | None]:
    """Wait for all processes of a run at rank 0's address; the environment with the port that is used, and the store.

    Keep the store until torch.distributed has started: rank 0's listens for it too. None where torchrun's agent has
    one, and for addresses where this process has met already. Raises ParallelError on the rank that knows what is
    wrong, ReportedElsewhere on others.
    """
    place = (env.master_addr, env.master_port)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or place in _met:
        return env, None
    listener = None
    if env.rank == 0:
        env, listener = listen(env)
    else:
        reach(env, min(limit_s, REACH_S))
    store = open_store(env, limit_s, listener)
    _met.add((env.master_addr, env.master_port))
    if env.world_size > 1:
        _gather(env, store, limit_s)
    return env, store


def listen(env: ProcessEnvironment) -> tuple[ProcessEnvironment, socket.socket]:
    """Rank 0's socket at its address, at another port where nobody gave this one. Raises ParallelError where the port
    is taken or the address is not this host's."""
    require_task(env, os.environ)
    alone = env.launcher == "python" and env.world_size == 1
    try:
        listener = ports.handed_on(env.master_port) or ports.listening(ports.ANY if alone else env.master_port)
    except OSError as error:
        why = ports.taken(str(env.master_port)) or error.strerror  # free again meanwhile
        raise ParallelError(f"rank 0 cannot listen at {_at(env)}: {why}", code="MDS705") from None
    env = replace(env, master_port=ports.port_of(listener))
    try:
        reach(env, SELF_S)
    except ParallelError:
        listener.close()
        raise
    return env, listener


def reach(env: ProcessEnvironment, limit_s: float) -> None:
    """Wait until somebody listens at rank 0's address. Raises ParallelError with the reason where nobody does."""
    started, noticed = time.monotonic(), False
    while True:
        try:
            socket.create_connection((env.master_addr, env.master_port), _ATTEMPT_S).close()
            return
        except (OSError, UnicodeError) as error:
            waited = time.monotonic() - started
            if isinstance(error, UnicodeError):  # no name server ever knows it
                raise ParallelError(
                    f"MASTER_ADDR: given {env.master_addr!r}, which is no host name", code="MDS704"
                ) from None
            unknown = isinstance(error, socket.gaierror)
            limit = min(limit_s, RESOLVE_S) if unknown else limit_s
            if waited >= limit:
                raise ParallelError(_not_reached(env, error, limit, unknown), code="MDS704") from None
            if waited > NOTICE_S and not noticed:
                noticed = True
                _logger.warning("waiting for rank 0 at %s (%s), up to %.0f s", _at(env), error, limit)
        time.sleep(_PAUSE_S)


def open_store(env: ProcessEnvironment, limit_s: float, listener: socket.socket | None) -> torch_distributed.TCPStore:
    """The calling process's end of rank 0's store. Raises ParallelError where what listens there is none."""
    descriptor = None if listener is None else listener.detach()

    def work() -> torch_distributed.TCPStore:
        return torch_distributed.TCPStore(
            env.master_addr,
            env.master_port,
            env.world_size,
            is_master=env.rank == 0,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch's own start then uses the server that listens already
            master_listen_fd=descriptor,
        )

    # What listens there may be another program, which never answers: torch would wait for it for good.
    found = in_time(work, min(limit_s, REACH_S) + _ATTEMPT_S)
    if isinstance(found, Exception):
        raise ParallelError(
            f"rank {env.rank} of {env.world_size}: what listens at {_at(env)} is not rank 0 of this run "
            f"({first_line(found)}); where another program has that port, {ports.OTHER_PORT}",
            code="MDS705",
        )
    return found


def in_time(action: Callable[[], Result], limit_s: float) -> Result | RuntimeError | TimeoutError:
    """What an action that may never end returns, or the RuntimeError that it raises; TimeoutError after `limit_s`."""
    ended: list[Result | RuntimeError] = []

    def work() -> None:
        try:
            ended.append(action())
        except RuntimeError as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    return ended[0] if ended else TimeoutError(f"no answer in {limit_s:.0f} s")


def allow_connections(world_size: int) -> None:
    """Let this process open as many files as connections to all others take. Hosts commonly allow 1,024, and more to
    those who ask; where they do not, it is logged."""
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OTHER_FILES + _CONNECTIONS * world_size
    if own == resource.RLIM_INFINITY or own >= wanted:
        return
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    if allowed < wanted:
        _logger.warning(
            "this host allows %d open files, %d processes may need %d: ulimit -Hn", most, world_size, wanted
        )


def claim_device(env: ProcessEnvironment, store: torch_distributed.Store, device: torch.device) -> None:
    """Say which GPU this process takes. Raises ParallelError where another process has taken it."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    takers = 1 if uuid is None else store.add(f"{_KEY}/device/{uuid}", 1)
    if takers > 1:
        raise ParallelError(
            f"rank {env.rank}: {env.local_world_size} processes on this node, but another one has the GPU that this "
            f"one sees ({device}, {uuid}); allowed: one per GPU.",
            code="MDS707",
        )


def name_interface(env: ProcessEnvironment) -> None:
    """Let gloo use the interface by which this host reaches rank 0, where nobody has named one. By itself it takes the
    address of the host's name, which many hosts know as one that nobody else reaches."""
    if env.local_world_size == env.world_size or os.environ.get(_INTERFACE):
        return
    own = _own_address(env.master_addr)
    if own is not None and _is_loopback(own) and not _is_loopback(env.master_addr):
        own = _own_address(_BEYOND)  # rank 0's host, which knows its own name by a loopback address
    name = None if own is None else _interface_of(own)
    if name is not None:
        os.environ[_INTERFACE] = name


def host_network_problem(env: ProcessEnvironment, error: Exception) -> ParallelError:
    """The error of a process that gloo did not connect with all others."""
    interface = os.environ.get(_INTERFACE) or "that of the host's name"
    return ParallelError(
        f"rank {env.rank} of {env.world_size} on {socket.gethostname()}: gloo does not connect all processes "
        f"({first_line(error)}); its interface here: {interface}; nearest: GLOO_SOCKET_IFNAME=INTERFACE on every host, "
        "one by which the hosts reach each other.",
        code="MDS708",
    )


def _own_address(other: str) -> str | None:
    """The IPv4 address by which this host reaches another; None where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((other, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return None


def _interface_of(address: str) -> str | None:
    """The name of this host's interface with an IPv4 address; None where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if answer[_ADDRESS] == socket.inet_aton(address):
                    return name
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _gather(env: ProcessEnvironment, store: torch_distributed.Store, limit_s: float) -> None:
    """Wait until every rank has come: rank 0 counts, and tells the others."""
    store.set(f"{_KEY}/{env.rank}", socket.gethostname())
    if env.rank:
        try:
            store.wait([f"{_KEY}/all"], timedelta(seconds=limit_s + _ATTEMPT_S))
        except RuntimeError as error:
            raise ReportedElsewhere(f"rank 0 at {_at(env)} ended ({first_line(error)})") from None
        return
    started, noticed = time.monotonic(), False
    missing = set(range(env.world_size))
    while missing := {rank for rank in missing if not store.check([f"{_KEY}/{rank}"])}:
        waited = time.monotonic() - started
        if waited >= limit_s:
            raise ParallelError(_missing(env, missing, limit_s), code="MDS706")
        if waited > NOTICE_S and not noticed:
            noticed = True
            _logger.warning("waiting at %s for %s, up to %.0f s", _at(env), _names(missing), limit_s)
        time.sleep(_PAUSE_S)
    store.set(f"{_KEY}/all", "come")


def _not_reached(env: ProcessEnvironment, error: Exception, limit_s: float, unknown: bool) -> str:
    host = socket.gethostname()
    reason = getattr(error, "strerror", None) or str(error)
    if unknown:
        return f"MASTER_ADDR: given {env.master_addr!r}, which {host} does not know after {limit_s:.0f} s ({reason})"
    if env.rank == 0:
        return (
            f"MASTER_ADDR: given {env.master_addr!r}, where rank 0 on {host} does not reach itself at port "
            f"{env.master_port} within {limit_s:.0f} s ({reason}); allowed: an address of the host that runs rank 0"
        )
    return (
        f"rank {env.rank} of {env.world_size} on {host}: nobody listens at {_at(env)} after {limit_s:.0f} s "
        f"({reason}); "
        "allowed: MASTER_ADDR and MASTER_PORT of a rank 0 that runs"
    )


def _missing(env: ProcessEnvironment, missing: set[int], limit_s: float) -> str:
    came = env.world_size - len(missing)
    return (
        f"{came} of {env.world_size} processes came to {_at(env)} within {limit_s:.0f} s (parallel.timeout_s); "
        f"missing: {_names(missing)}. Were all of them started, and with the same MASTER_ADDR and MASTER_PORT?"
    )


def _names(ranks: set[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return "rank " + ", ".join(map(str, sorted(ranks)[:_SHOWN])) + more


def _at(env: ProcessEnvironment) -> str:
    return f"{env.master_addr}:{env.master_port}"


def first_line(error: Exception) -> str:
    """What an error says in its first line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
