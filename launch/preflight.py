"""Look at a cluster before training on it.

Start it as training will be started:

    mythos-ds preflight --config 1t.json                                # this host alone
    mythos-ds preflight --config 1t.json --hostfile hosts               # by ssh: hosts, versions, data, disk
    deepspeed --hostfile hosts --module mythos_ds preflight --config 1t.json   # the same, and devices and links
    srun mythos-ds preflight --config 1t.json --json > preflight.json

Exit code 0: ready to train; 1: a check failed; 2: the hostfile, the configuration or the command line is wrong.
"""

import argparse
import json
import os
import sys
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.cluster.hostfile import Line, read_hostfile
from mythos_ds.cluster.preflight import host_facts
from mythos_ds.cluster.preflight.report import Check, as_json, passed, places, show
from mythos_ds.cluster.preflight.ssh import ask
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, planned_world_size, resolve
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import USER_ERROR_EXIT_CODE, ConfigError, MythosError, ParallelError
from mythos_ds.parallel.groups import select_device
from mythos_ds.train.run_directory import default_run_directory

if TYPE_CHECKING:
    from mythos_ds.cluster.preflight.rendezvous import Meeting

FAILED_EXIT_CODE = 1
FAREWELL_S = 5.0
GROUP_SHARE = 0.6
"""A collective that hangs must fail while there is still time to say whose fault it was."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a preset such as tiny or 1t.json")
    parser.add_argument("--run-dir", type=Path, help="default: that of training")
    parser.add_argument("--hostfile", type=Path, help="without a launcher: look at these hosts by ssh")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help="for all checks together")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--facts", nargs=2, metavar=("TOKEN", "PROCESSES"), help=argparse.SUPPRESS)  # over ssh
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


class Preflight:
    """One command line: what to look at, and how to report it."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    @cached_property
    def run_dir(self) -> Path:
        """Where training will write. ConfigError."""
        given: Path | None = self.arguments.run_dir
        return given or default_run_directory(load_config(self.arguments.config, self.arguments.overrides))

    def resolved(self, processes: int, *, launched: bool = True) -> ResolvedRun:
        """The configuration on so many processes, or on its own cluster where none was launched. ConfigError."""
        config = load_config(self.arguments.config, self.arguments.overrides).config
        return resolve(config, processes if launched else planned_world_size(config))

    def _resolved_here(self, environment: ProcessEnvironment) -> ResolvedRun:
        return self.resolved(environment.world_size, launched=environment.launcher != "python")

    def report(self, checks: list[Check], hosts: list[str], processes: int) -> int:
        """Print the outcome; the exit code."""
        if self.arguments.json:
            print(as_json(checks, hosts, processes), flush=True)
        else:
            show(checks, hosts, processes)
        return 0 if passed(checks) else FAILED_EXIT_CODE

    def by_ssh(self) -> int:
        """Every host of the hostfile, without a launcher."""
        lines = read_hostfile(self.arguments.hostfile)
        processes = sum(line.slots for line in lines)
        resolved = self.resolved(processes)
        token = uuid.uuid4().hex[:12]
        with host_facts.Markers(self.run_dir, resolved.config.data, token) as markers:
            told = ["--facts", "-" if markers.problems else token, str(processes), *self._same_question()]
            found, reached = ask(lines, Path(__file__).resolve(), told, self.arguments.timeout)
        checks = [_layout(resolved, lines), reached]
        checks += [Check("run directory", False, places(markers.problems))] if markers.problems else []
        if found:
            checks += host_facts.verdicts(found, resolved)
            checks.append(host_facts.clocks([(fact["host"], fact["offset"]) for fact in found], 0.0))
        return self.report(checks, [line.host for line in lines], processes)

    def _same_question(self) -> list[str]:
        return ["--config", self.arguments.config, "--run-dir", str(self.run_dir), *self.arguments.overrides]

    def answer(self) -> int:
        """This host's part of `by_ssh`: its facts as a line of JSON."""
        token, processes = self.arguments.facts
        resolved = self.resolved(int(processes))
        token = None if token == "-" else token
        print(json.dumps(host_facts.gather(resolved, self.run_dir, token, write=True)))
        return 0

    def by_launcher(self, environment: ProcessEnvironment) -> int:
        """One process of many (or the only one), started as training will be."""
        from mythos_ds.cluster.preflight.rendezvous import Meeting, MissingRank, Watchdog

        def expire() -> None:
            _complain(f"preflight: rank {environment.rank}: hangs; ended after {self.arguments.timeout:g} s")
            os._exit(FAILED_EXIT_CODE)

        with Watchdog(self.arguments.timeout + 3 * FAREWELL_S, expire):
            try:
                meeting = Meeting(environment, self.arguments.timeout)
                return self._lead(meeting) if environment.rank == 0 else self._follow(meeting)
            except MissingRank as absent:
                _complain(f"preflight: {absent}")
            except RuntimeError:  # the store ended with rank 0, which has said why
                _complain(f"preflight: rank {environment.rank}: rank 0 is gone")
            return FAILED_EXIT_CODE

    def _follow(self, meeting: "Meeting") -> int:
        for stage in ("facts", "device", "links"):
            announced = meeting.hear(stage)
            if announced is None:
                break
            meeting.tell(stage, self._take_part(stage, meeting, announced))
        code = int(meeting.hear("end"))
        meeting.tell("bye", None)
        return code

    def _lead(self, meeting: "Meeting") -> int:
        processes = meeting.environment.world_size
        try:
            resolved = self._resolved_here(meeting.environment)
        except MythosError as error:
            _complain(f"error: {error}")
            return _part(meeting, USER_ERROR_EXIT_CODE)
        token = uuid.uuid4().hex[:12]
        checks: list[Check] = []
        with host_facts.Markers(self.run_dir, resolved.config.data, token) as markers:
            checks += [Check("run directory", False, places(markers.problems))] if markers.problems else []
            hosts = self._stages(meeting, checks, resolved, None if markers.problems else token)
        code = self.report(checks, hosts, processes)
        return _part(meeting, code)

    def _stages(self, meeting: "Meeting", checks: list[Check], resolved: ResolvedRun, token: str | None) -> list[str]:
        """Appends to `checks` until a stage fails in a way that makes the next one pointless; returns the hosts."""
        from mythos_ds.cluster.preflight import devices
        from mythos_ds.cluster.preflight.rendezvous import nodes_of

        found = self._stage("facts", token, meeting, checks)
        if found is None:
            return ["?"]
        hosts = [fact["host"] for fact in found]
        checks += host_facts.verdicts(found, resolved)
        names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
        found = self._stage("device", True, meeting, checks)
        if found is None:
            return hosts
        checks += devices.device_verdicts(found, names)
        found = self._stage("links", nodes_of(hosts), meeting, checks)
        if found is None:
            return hosts
        on_gpu = found[0]["device"] == "cuda"
        checks += devices.link_verdicts([fact["speeds"] for fact in found], names, judge=on_gpu)
        offsets = [sorted(fact["offsets"])[len(fact["offsets"]) // 2] for fact in found]
        spread = max(max(fact["offsets"]) - min(fact["offsets"]) for fact in found)
        checks.append(host_facts.clocks(list(zip(hosts, offsets, strict=True)), spread))
        return hosts

    def _stage(self, stage: str, announced: Any, meeting: "Meeting", checks: list[Check]) -> list[Any] | None:
        """Everybody's answer, or None with a failed check that names who has none."""
        from mythos_ds.cluster.preflight.rendezvous import MissingRank

        meeting.announce(stage, announced if announced is not None else "")
        meeting.tell(stage, self._take_part(stage, meeting, announced))
        try:
            found = meeting.collect(stage)
        except MissingRank as absent:
            checks.append(Check("processes", False, str(absent)))
            return None
        problems = [f"{meeting.name(rank)}: {fact['error']}" for rank, fact in enumerate(found) if "error" in fact]
        if problems:
            checks.append(Check(stage, False, places(problems)))
            return None
        return found

    def _take_part(self, stage: str, meeting: "Meeting", announced: Any) -> host_facts.HostFacts:
        """This rank's answer; what went wrong in it is an answer too."""
        try:
            if stage == "facts":
                resolved = self._resolved_here(meeting.environment)
                one_of_host = meeting.environment.local_rank == 0
                return host_facts.gather(resolved, self.run_dir, announced or None, write=one_of_host)
            return _device(meeting) if stage == "device" else _links(meeting, announced)
        except Exception as error:
            message = str(error).splitlines() or [""]
            return {"error": f"{type(error).__name__}: {message[0]}"}


def _device(meeting: "Meeting") -> host_facts.HostFacts:
    from mythos_ds.cluster.preflight import devices

    return devices.device_facts(select_device(meeting.environment))


def _links(meeting: "Meeting", nodes: dict[str, list[int]]) -> host_facts.HostFacts:
    from mythos_ds.cluster.preflight import devices

    device = select_device(meeting.environment)
    devices.open_group(meeting.environment, device, meeting.store, meeting.left_s * GROUP_SHARE)
    offsets = devices.clock_offset(device)
    return {
        "device": device.type,
        "offsets": offsets,
        "speeds": devices.link_speeds(devices.Links.of(nodes), device),
    }


def _layout(resolved: ResolvedRun, lines: list[Line]) -> Check:
    slots = sorted({line.slots for line in lines})
    text = f"{len(lines)} hosts with {' or '.join(map(str, slots))} processes"
    cluster = resolved.config.cluster
    if cluster is None:
        return Check("hostfile", True, text)
    fits = cluster.nodes == len(lines) and slots == [cluster.gpus_per_node]
    planned = f"the configuration is laid out for {cluster.nodes} with {cluster.gpus_per_node}"
    return Check("hostfile", True if fits else None, text if fits else f"{text}; {planned}")


def _part(meeting: "Meeting", code: int) -> int:
    """Tell everybody the exit code, and stay until they know it: the store ends with this process."""
    from mythos_ds.cluster.preflight.rendezvous import MissingRank

    for stage in ("facts", "device", "links"):
        if not meeting.announced(stage):
            meeting.announce(stage, None)
    meeting.announce("end", code)
    meeting.tell("bye", None)
    meeting.limit(FAREWELL_S)
    try:
        meeting.collect("bye")
    except MissingRank:
        return code or FAILED_EXIT_CODE
    return code


def _complain(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    preflight = Preflight(arguments)
    try:
        if not 0 < arguments.timeout < float("inf"):
            raise ConfigError(f"--timeout: given {arguments.timeout:g}; allowed: seconds above 0; nearest: 180")
        if arguments.facts:
            return preflight.answer()
        environment = ProcessEnvironment.detect(os.environ)
        if arguments.hostfile is None:
            return preflight.by_launcher(environment)
        if environment.launcher != "python":
            raise ParallelError(f"--hostfile has no effect under {environment.launcher}; remove it")
        return preflight.by_ssh()
    except MythosError as error:
        _complain(f"error: {error}")
        return USER_ERROR_EXIT_CODE


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group now and then abort the interpreter's own way out
