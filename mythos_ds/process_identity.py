"""Which process this is, in words that other processes and hosts can read; and whether such a one is dead."""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_DEAD_STATES = ("Z", "X")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process. `start`: when it started, in ticks after the boot, so that a later process of the same number is not
    taken for it; `machine`, `boot` and `namespace` (of process numbers) are empty where the system does not say."""

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    start: int

    @classmethod
    def own(cls) -> "ProcessIdentity":
        """This process."""
        pid = os.getpid()
        return cls(*_place(), pid, _start(pid) or 0)

    def is_alive(self) -> bool:
        """Whether it is known to run, on this host."""
        return self._is_near() and _start(self.pid) == self.start

    def is_dead(self) -> bool:
        """Whether it is known to have ended: its number is no longer its own here, or this host has been booted since.
        False for what another host, or a container, counts for itself."""
        host, machine, boot, _ = _place()
        if self._is_near():
            return _start(self.pid) != self.start
        # Hosts share names, and copied disks their machine's id: a later boot is only told where both agree.
        return (
            bool(machine and boot and self.boot) and (self.host, self.machine) == (host, machine) and self.boot != boot
        )

    def _is_near(self) -> bool:
        own = _place()
        return all(own[2:]) and (self.host, self.machine, self.boot, self.namespace) == own


def signature() -> str:
    """This process in a few characters, for names of files."""
    own = ProcessIdentity.own()
    return f"{_digest()}-{own.pid}-{own.start}"


def runs(given: str) -> bool | None:
    """Whether the process of a `signature` runs; None where it is another host's."""
    digest, pid, start = given.split("-")
    if digest != _digest() or not _place()[3]:
        return None
    return _start(int(pid)) == int(start)


def _digest() -> str:
    host, machine, _, namespace = _place()
    return hashlib.sha256("\n".join((host, machine, namespace)).encode()).hexdigest()[:8]


@cache
def _place() -> tuple[str, str, str, str]:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return socket.gethostname(), _line("/etc/machine-id"), _line("/proc/sys/kernel/random/boot_id"), namespace


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _start(pid: int) -> int | None:
    """None where there is no such process, or only what is left of a dead one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in _DEAD_STATES else int(fields[19])
