"""The hostfile's reader beside DeepSpeed's, over made files; and what is refused on purpose."""

import itertools
import os
import random

import pytest

from mythos_ds.cluster.hostfile import MAX_SLOTS, Line, read_hostfile
from mythos_ds.errors import ParallelError

HOSTS = (
    *("worker-0", "node1.cluster.local", "node1.cluster.local.", "192.0.2.10", "fe80::1%eth0", "[2001:db8::1]", "a_b"),
    *("trainer@192.0.2.10", "first.last@gpu", "WORKER-9", "bücher.example", "node[1-8]", "a,b", "x" * 300, "localhost"),
)
GAPS = (" ", "\t", "   ", " \t ", "\u00a0", "\v", "\f")
REST = (
    *("", " max_slots=8", "\tslots=9", " # eight", "#eight", ",gpus", " cpu=64 # x", "x", ".5", " rack=b max_slots=4"),
    *("\f", " \u2028x", " é"),
)
NUMBERS = ("8", "1", "08", "16", "٣")
ENDS = ("\n", "\r\n", "\r")
WRONG = (
    *("worker-0", "worker-0:8", "worker-0 slots=", "worker-0 slots=-1", "worker-0 slots 8", "slots=8", "worker-0 8"),
    *("worker-0 slots =8", "worker-0 Slots=8", "worker-0 max_slots=8 slots=8", "[group]", "; comment", "// comment"),
)


def deepspeed_reads(path):
    """Hosts and slots, or None where DeepSpeed refuses the file."""
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        return [Line(host, slots) for host, slots in fetch_hostfile(str(path)).items()]
    except ValueError:
        return None


def both(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    own: list[Line] | str
    try:
        own = read_hostfile(path)
    except ParallelError as error:
        own = str(error)
    return own, deepspeed_reads(path)


@pytest.mark.parametrize("seed", range(40))
def test_it_reads_what_deepspeed_reads(tmp_path, seed):
    """Files of right and wrong lines: accepted by both with the same hosts and slots, or by neither."""
    pick = random.Random(seed)
    end = pick.choice(ENDS)
    lines = []
    for host in pick.sample(HOSTS, pick.randint(1, 5)):
        lines += pick.choices(["", "   ", "# comment", "  # é", "#", "\f"], k=pick.randint(0, 2))
        gap = pick.choice(GAPS)
        lines.append(pick.choice(["", " ", "\t"]) + f"{host}{gap}slots={pick.choice(NUMBERS)}{pick.choice(REST)}" + gap)
    if pick.random() < 0.4:
        lines.insert(pick.randint(0, len(lines)), pick.choice(WRONG))
    own, theirs = both(tmp_path, end.join(lines) + pick.choice(["", end]))
    if theirs is None:
        assert isinstance(own, str)
        assert "hosts" in own
    else:
        assert own == theirs or "is the same host" in own


@pytest.mark.parametrize(("host", "rest"), list(itertools.product(HOSTS, REST)))
def test_whatever_stands_beside_host_and_slots_is_read_as_deepspeed_reads_it(tmp_path, host, rest):
    own, theirs = both(tmp_path, f"{host} slots=8{rest}\n")
    assert own == theirs == [Line(host, 8)]


@pytest.mark.parametrize("text", [*WRONG, "", "\n\n", "# only a comment\n", "worker-0 slots=8\nworker-0 slots=8"])
def test_what_deepspeed_refuses_is_refused_with_its_line(tmp_path, text):
    own, theirs = both(tmp_path, text)
    assert theirs is None
    assert isinstance(own, str)
    assert "hosts" in own
    assert "allowed: " in own or "give it once" in own


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("worker-0", "WORKER-0"),
        ("Worker-0.Local", "worker-0.local."),
        ("node.cluster", "node.cluster."),
        ("192.0.2.1", "trainer@192.0.2.1"),
        ("one@gpu", "two@GPU"),
        ("2001:db8::1", "2001:DB8:0:0::1"),
        ("[::1]", "::1"),
    ],
)
def test_one_host_under_two_spellings_is_told(tmp_path, first, second):
    own, theirs = both(tmp_path, f"# hosts\n{first} slots=8\nother slots=8\n{second} slots=8\n")
    assert theirs is not None
    assert own.endswith(
        f"hosts:4: {second} is already in line 2 as {first}, which is the same host; "
        "give it once, with the sum of its slots"
    )


@pytest.mark.parametrize(
    "text", ["\ufeffworker-0 slots=8", "\ufeff# hosts\nworker-0 slots=8", "a slots=8\n\ufeffb slots=8"]
)
def test_a_byte_order_mark_is_told_by_name(tmp_path, text):
    own, _ = both(tmp_path, text)
    assert "byte order mark (U+FEFF)" in own
    assert f"hosts:{text[: text.index(chr(0xFEFF))].count(chr(10)) + 1}: " in own


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=id", "user@-l", "user@", "a\x00b", "a\u200bb", "a\x1bb", "@", "no|de", "$(id)", "`id`"]
)
def test_a_name_that_no_host_has_is_refused(tmp_path, host):
    own, theirs = both(tmp_path, f"{host} slots=8\n")
    assert theirs is not None
    assert "hosts:1: given the host name" in own


@pytest.mark.parametrize("slots", ["0", "000", str(MAX_SLOTS + 1), "9" * 4000, "9" * 100_000])
def test_slots_that_no_host_has_are_refused(tmp_path, slots):
    own, _ = both(tmp_path, f"worker-0 slots={slots}\n")
    assert f"allowed: 1 to {MAX_SLOTS}" in own
    assert len(own) < 400


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "binary", "latin-1", "closed"])
def test_what_is_no_text_file_is_one_message(tmp_path, kind):
    path = tmp_path / "hosts"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes({"binary": b"\xff\xfe\x00", "latin-1": b"a slots=1\nb\xe9 slots=8", "closed": b""}[kind])
    if kind == "closed":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads everything")
    with pytest.raises(ParallelError, match="hosts"):
        read_hostfile(path)
