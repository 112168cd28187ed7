"""Ports: held from choice to use, handed on to one process, and the holder's name."""

import os
import socket
import subprocess
import sys

import pytest

from mythos_ds import ports

LISTENERS = {
    "all": ("0.0.0.0", socket.AF_INET),
    "loopback": ("127.0.0.1", socket.AF_INET),
    "six": ("::", socket.AF_INET6),
    "six loopback": ("::1", socket.AF_INET6),
}


@pytest.mark.parametrize("kind", LISTENERS)
def test_a_taken_port_is_refused_and_its_holder_named(kind):
    address, family = LISTENERS[kind]
    try:
        taken = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    with taken:
        port = ports.port_of(taken)
        with pytest.raises(OSError, match="in use"):
            ports.listening(port).close()
        said = ports.holder(port)
        assert said is not None
        assert said.startswith(f"process {os.getpid()} (")
    ports.listening(port).close()


def test_the_holder_is_another_process():
    code = (
        "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, "a\nline", "x" * 500]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        said = ports.holder(int(other.stdout.readline()))
        other.communicate("")
    assert said is not None
    assert said.startswith(f"process {other.pid} (")
    assert len(said) < 100
    assert "\n" not in said


def test_a_free_port_has_no_holder():
    with ports.listening(ports.ANY) as listener:
        port = ports.port_of(listener)
    assert ports.holder(port) is None


def test_a_taken_port_is_told_with_a_free_one():
    with ports.listening(ports.ANY) as listener:
        port = ports.port_of(listener)
        said = ports.taken(str(port))
        assert said is not None
        assert said.startswith(f"port {port} is taken by process {os.getpid()} (")
        assert ports.taken(said.rpartition(" ")[2]) is None
    assert ports.taken(str(port)) is None


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "x", "9" * 5000, "1 2", "٣", "29400.0"])
def test_what_is_no_port_is_told(port):
    said = ports.taken(port)
    assert said is not None
    assert said.endswith("allowed: 1 to 65535")
    assert len(said) < 120


def test_a_held_socket_is_handed_on_once():
    with ports.listening(ports.ANY) as listener:
        port = ports.port_of(listener)
        variables = {ports.HELD: str(os.dup(listener.fileno()))}
    with pytest.raises(OSError, match="in use"):  # still held
        ports.listening(port)
    found = ports.handed_on(port, variables)
    assert found is not None
    with found:
        assert ports.port_of(found) == port
        assert ports.handed_on(port, variables) is None


@pytest.mark.parametrize("given", ["", "x", "-1", "999999", str(2**70), "0", "listens elsewhere", "does not listen"])
def test_what_is_no_held_socket_is_left_alone(given):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        numbers = {"listens elsewhere": listener.fileno(), "does not listen": idle.fileno()}
        wanted = ports.port_of(idle) if given == "does not listen" else 1
        assert ports.handed_on(wanted, {ports.HELD: str(numbers.get(given, given))}) is None
        assert ports.port_of(listener)  # not closed
        assert ports.port_of(idle)
