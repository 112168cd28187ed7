"""Several hosts on one machine: network namespaces with addresses, names, mounts and an ssh server of their own.

The switch between them is a bridge in a namespace too, so the machine's own network is not touched. Processor and
file system are shared: the file system stands for the storage that a cluster shares.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "timeout")
COMMAND_S = 20
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_numbers = itertools.count()


def unavailable(*more_programs: str) -> str | None:
    """Why hosts cannot be made here, or None where they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [name for name in (*PROGRAMS, *more_programs) if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"mythos-probe-{os.getpid()}"
    probes = (
        ["netns", "add", name],
        ["-n", name, "link", "add", "switch", "type", "bridge"],
        ["-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two"],
    )
    try:
        for probe in probes:
            _ip(*probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, env=_environment(), check=False)
    return None


@dataclass(frozen=True)
class Host:
    """One host: `address` is what the others reach it by, `mounts` are shell commands of its mount namespace."""

    name: str
    namespace: str
    address: str
    mounts: tuple[str, ...] = ()


class Hosts:
    """`count` hosts that reach each other by ssh without a password. Use as a context manager: it ends everything.

    `mounts`: by host number, shell commands run in that host's mount namespace before its ssh server starts, such as
    "mount -t tmpfs -o size=1m none /some/folder".
    """

    def __init__(self, count: int, folder: Path, *, mounts: Mapping[int, Sequence[str]] | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        serial = next(_numbers)
        self._switch = f"mythos-{os.getpid()}-{serial}-switch"
        self._processes: list[subprocess.Popen] = []
        self.all = [
            Host(
                f"host{number}",
                f"mythos-{os.getpid()}-{serial}-{number}",
                f"10.91.{serial % 250}.{number + 1}",
                tuple((mounts or {}).get(number, ())),
            )
            for number in range(count)
        ]

    def __enter__(self) -> "Hosts":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def hostfile(self, slots: int = 1, *, hosts: Sequence[str] | None = None) -> Path:
        """A hostfile of all hosts (or of `hosts`), as `deepspeed --hostfile` reads it."""
        path = self.folder / "hosts"
        addresses = hosts if hosts is not None else [host.address for host in self.all]
        path.write_text("".join(f"{address} slots={slots}\n" for address in addresses))
        return path

    def start(
        self, host: Host, command: Sequence[str], *, log: Path, limit_s: float, cwd: Path, variables: Mapping[str, str]
    ) -> subprocess.Popen:
        """Start a command on `host`; it is killed after `limit_s` seconds, and in any case at the end."""
        # Not SIGTERM: DeepSpeed's launcher answers it with a `pkill` by name, which finds other runs on this machine.
        line = f"cd {shlex.quote(str(cwd))} && exec timeout -s KILL {limit_s} {shlex.join(command)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                self._inside(host, line),
                env={**_environment(), "PATH": f"{self.folder}{os.pathsep}{_PATH}", **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def cut(self, host: Host) -> None:
        """Take the host off the network: its packets are lost, nobody is told."""
        _ip("-n", self._switch, "link", "set", host.name, "down")

    def join(self, host: Host) -> None:
        """Put the host back."""
        _ip("-n", self._switch, "link", "set", host.name, "up")

    def pids(self, host: Host) -> list[int]:
        """Processes that run on the host, its ssh server included."""
        listed = subprocess.run(
            ["ip", "netns", "pids", host.namespace], env=_environment(), capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def close(self) -> None:
        """End every process on the hosts, and the hosts."""
        for host in self.all:
            for pid in self.pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for namespace in [*(host.namespace for host in self.all), self._switch]:
            subprocess.run(["ip", "netns", "del", namespace], env=_environment(), capture_output=True, check=False)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for host in self.all:
            _ip("netns", "add", host.namespace)
            peer = ("peer", "name", host.name, "netns", self._switch)
            _ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", *peer)
            _ip("-n", self._switch, "link", "set", host.name, "master", "switch", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        self._write_keys()
        for host in self.all:
            self._start_server(host)
        for host in self.all:
            self._await_server(host)

    def _write_keys(self) -> None:
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True, timeout=COMMAND_S)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized")
        options = {
            "IdentityFile": self.folder / "user_key",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            # A host that is cut off is noticed after four seconds.
            "ServerAliveInterval": 2,
            "ServerAliveCountMax": 2,
        }
        (self.folder / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        # `ssh` reads the user's own configuration wherever HOME points; what pdsh and DeepSpeed find first is this.
        wrapper = self.folder / "ssh"
        program = shutil.which("ssh", path=_PATH)
        wrapper.write_text(f'#!/bin/sh\nexec {program} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _start_server(self, host: Host) -> None:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        settings = {
            "ListenAddress": host.address,
            "HostKey": self.folder / "host_key",
            "PidFile": "none",
            "AuthorizedKeysFile": self.folder / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "ClientAliveInterval": 2,
            "ClientAliveCountMax": 2,
            "MaxStartups": 100,
        }
        file = self.folder / f"sshd_{host.name}"
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        server = shutil.which("sshd", path=_PATH)
        command = [str(server), "-D", "-e", "-f", str(file)]
        log = self.folder / f"sshd_{host.name}.log"
        self.start(host, command, log=log, limit_s=1800, cwd=self.folder, variables={})

    def _await_server(self, host: Host) -> None:
        deadline = time.monotonic() + COMMAND_S
        probe = self._inside(self.all[0], f"{self.folder}/ssh -o ConnectTimeout=2 {host.address} hostname")
        while True:
            answer = subprocess.run(probe, env=_environment(), capture_output=True, text=True, timeout=COMMAND_S)
            if answer.returncode == 0:
                assert answer.stdout.strip() == host.name
                return
            if time.monotonic() > deadline:
                log = (self.folder / f"sshd_{host.name}.log").read_text()
                raise AssertionError(f"no ssh to {host.name}: {answer.stderr}\n{log}")
            time.sleep(0.2)

    @staticmethod
    def _inside(host: Host, line: str) -> list[str]:
        """`line` as a shell command with the host's network, name and mounts."""
        script = " && ".join([f"hostname {host.name}", *host.mounts, line])
        return ["ip", "netns", "exec", host.namespace, "unshare", "--uts", "--mount", "sh", "-c", script]


def _ip(*arguments: str) -> None:
    subprocess.run(
        ["ip", *arguments], env=_environment(), check=True, capture_output=True, text=True, timeout=COMMAND_S
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}
