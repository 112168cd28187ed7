"""TCP ports of this machine: one to listen at, held from its choice to its use, and who holds one that is taken."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator, MutableMapping
from pathlib import Path

HELD = "MYTHOS_LISTENING_FD"
"""The variable by which a process that starts rank 0 hands on the socket that listens at the run's port."""
ANY = 0
LAST_PORT = 2**16 - 1
OTHER_PORT = "give another by MASTER_PORT (deepspeed and torchrun: --master_port)"
_DIGITS = 6
_ALL_INTERFACES = "::"
_BACKLOG = 4096
_PROC = Path("/proc")
_TABLES = ("net/tcp", "net/tcp6")
_LISTENING = "0A"
_SHOWN_CHARACTERS = 60


def listening(port: int) -> socket.socket:
    """A socket that listens at `port` (`ANY`: at a free one) of all interfaces. Raises OSError where it cannot."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                (_ALL_INTERFACES, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
            # else IPv6 is switched off
    return socket.create_server(("", port), backlog=_BACKLOG)


def port_of(listener: socket.socket) -> int:
    """Where a socket listens."""
    return int(listener.getsockname()[1])


def handed_on(port: int, environ: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """The socket that who started this process holds for it at `port`; once, and None where there is none."""
    number = environ.pop(HELD, "")
    if not number.isdecimal():
        return None
    try:
        listener = socket.socket(fileno=int(number))
    except (OSError, OverflowError):
        return None
    with contextlib.suppress(OSError):
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and port_of(listener) == port:
            return listener
    listener.detach()
    return None


def holder(port: int) -> str | None:
    """Which process of this machine has `port`, in words; None where the system does not tell."""
    found = sorted(_entries(port), reverse=True)
    if not found:
        return None
    _, inode, user = found[0]
    for pid in sorted(int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()):
        if _has_socket(pid, inode):
            return f"process {pid} ({_command(pid)})"
    return f"a process of user {user}"


def taken(port: str) -> str | None:
    """Why nobody can listen at a port as it was given, with who has it and one that is free; None where one can."""
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:_DIGITS]) <= LAST_PORT and len(port) < _DIGITS):
        return f"port: given {port[:_SHOWN_CHARACTERS]!r}; allowed: 1 to {LAST_PORT}"
    try:
        listening(int(port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"port {port}: nothing can listen there ({error.strerror}); allowed: above 1023"
        with listening(ANY) as free:
            nearest = port_of(free)
        who = holder(int(port)) or "a process that this system does not name"
        return f"port {port} is taken by {who}; {OTHER_PORT}; free now: {nearest}"
    return None


def _entries(port: int) -> Iterator[tuple[bool, str, str]]:
    """(whether it listens, inode, user id) of each socket at a port."""
    for table in _TABLES:
        try:
            lines = (_PROC / table).read_text(encoding="utf-8").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and int(fields[1].rpartition(":")[2], 16) == port and fields[9] != "0":
                yield fields[3] == _LISTENING, fields[9], fields[7]


def _has_socket(pid: int, inode: str) -> bool:
    try:
        return any(os.readlink(link) == f"socket:[{inode}]" for link in os.scandir(_PROC / str(pid) / "fd"))
    except OSError:  # of another user, or gone meanwhile
        return False


def _command(pid: int) -> str:
    try:
        text = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended meanwhile"
    text = re.sub(r"\s+", " ", "".join(letter if letter.isprintable() else " " for letter in text))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
