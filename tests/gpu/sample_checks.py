"""Checks that end in every way, for the tests of what runs them."""

import os
import signal
import subprocess
import sys
import time

from mythos_ds.bench.acceptance import Probe


def passes(probe: Probe) -> None:
    probe.number("sum", 2, equals=2)
    probe.number("time", 0.25, "s", at_most=1.0, at_least=0.0)
    probe.number("only reported", 7.0, "TFLOP/s")
    probe.note("kernels", ["one", "two"])


def misses_a_bar(probe: Probe) -> None:
    probe.number("error", 0.5, "nats", at_most=0.25)
    probe.number("rate", 10.0, at_least=5.0)


def measures_nan(probe: Probe) -> None:
    probe.number("error", float("nan"), at_most=1.0)


def measures_nothing(probe: Probe) -> None:
    probe.note("kernels", [])


def raises(probe: Probe) -> None:
    probe.number("before", 1.0)
    raise RuntimeError("no kernel\nand more")


def crashes(probe: Probe) -> None:
    probe.number("before", 1.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def skips(probe: Probe) -> None:
    probe.skip("not here")


def skips_after_a_miss(probe: Probe) -> None:
    misses_a_bar(probe)
    probe.skip("the rest not here")


def hangs(probe: Probe) -> None:
    """With a process in another session, and deaf to SIGTERM, as one in a CUDA call is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    probe.number("process left", other.pid)
    time.sleep(600)
