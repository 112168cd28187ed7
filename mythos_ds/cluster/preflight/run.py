"""The course of a preflight: asks every host and rank what it sees, by ssh or through the launcher's own processes, and
judges the answers. What is found goes to `report` and `complain`: the caller prints it."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_ds.cluster.hostfile import Line, read_hostfile
from mythos_ds.cluster.preflight import host_facts
from mythos_ds.cluster.preflight.report import Check, passed, places
from mythos_ds.cluster.preflight.ssh import ask
from mythos_ds.config.dispatch import choose_dispatch, dispatch_problem
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedRun, ResolvedStage, planned_world_size, resolve_stages
from mythos_ds.costs.communicators import outside_bytes
from mythos_ds.environment import ProcessEnvironment
from mythos_ds.errors import USER_ERROR_EXIT_CODE, MythosError
from mythos_ds.train.run_directory import default_run_directory

if TYPE_CHECKING:
    from mythos_ds.cluster.preflight.rendezvous import Meeting

FAILED_EXIT_CODE = 1
FAREWELL_S = 5.0
GROUP_SHARE = 0.6
"""A collective that hangs must fail while there is still time to say whose fault it was."""


@dataclass(frozen=True)
class Preflight:
    """The question that every host and rank is asked about one run, and who hears what was found."""

    config: str
    """A path or a preset's name."""
    overrides: Sequence[str]
    given_run_dir: Path | None
    limit_s: float
    """For all checks together."""
    report: Callable[[Sequence[Check], Sequence[str], int], None]
    """Gets the checks, the hosts and the number of processes."""
    complain: Callable[[str], None]
    """Gets a line about what ended the preflight."""

    @cached_property
    def run_dir(self) -> Path:
        """Where training will write. ConfigError."""
        return self.given_run_dir or default_run_directory(load_config(self.config, self.overrides))

    def resolved(self, processes: int, *, launched: bool = True) -> tuple[ResolvedStage, ...]:
        """The training stages on so many processes, or on their own cluster where none was launched. ConfigError."""
        loaded = load_config(self.config, self.overrides)
        return resolve_stages(loaded.stages, processes if launched else planned_world_size(loaded.config))

    def _resolved_here(self, environment: ProcessEnvironment) -> tuple[ResolvedStage, ...]:
        return self.resolved(environment.world_size, launched=environment.launcher != "python")

    def _report(self, checks: list[Check], hosts: list[str], processes: int) -> int:
        """Hands on the outcome; the exit code."""
        self.report(checks, hosts, processes)
        return 0 if passed(checks) else FAILED_EXIT_CODE

    def by_ssh(self, hostfile: Path, script: Path) -> int:
        """Looks at every host of the hostfile without a launcher, by running `script` there; the exit code.

        `script --facts TOKEN PROCESSES ...` prints `host_answer` as a line of JSON.
        """
        lines = read_hostfile(hostfile)
        processes = sum(line.slots for line in lines)
        stages = self.resolved(processes)
        token = uuid.uuid4().hex[:12]
        with host_facts.Markers(self.run_dir, stages, token) as markers:
            told = ["--facts", "-" if markers.problems else token, str(processes), *self._same_question()]
            found, reached = ask(lines, script, told, self.limit_s)
        checks = [_layout(stages[0].run, lines), reached]
        checks += [Check("run directory", False, places(markers.problems))] if markers.problems else []
        if found:
            checks += host_facts.verdicts(found, stages)
            checks.append(host_facts.clocks([(fact["host"], fact["offset"]) for fact in found], 0.0))
        return self._report(checks, [line.host for line in lines], processes)

    def _same_question(self) -> list[str]:
        return ["--config", self.config, "--run-dir", str(self.run_dir), *self.overrides]

    def host_answer(self, token: str, processes: int) -> host_facts.HostFacts:
        """This host's part of `by_ssh`; "-" is no token."""
        return host_facts.gather(self.resolved(processes), self.run_dir, None if token == "-" else token, write=True)

    def by_launcher(self, environment: ProcessEnvironment, end: Callable[[int], object]) -> int:
        """Takes part as one process of many (or the only one), started as training will be; the exit code.

        `end` ends a process that hangs, with an exit code.
        """
        from mythos_ds.cluster.preflight.rendezvous import Meeting, MissingRank, Watchdog

        def expire() -> None:
            self.complain(f"preflight: rank {environment.rank}: hangs; ended after {self.limit_s:g} s")
            end(FAILED_EXIT_CODE)

        with Watchdog(self.limit_s + 3 * FAREWELL_S, expire):
            try:
                meeting = Meeting(environment, self.limit_s)
                return self._lead(meeting) if environment.rank == 0 else self._follow(meeting)
            except MissingRank as absent:
                self.complain(f"preflight: {absent}")
            except RuntimeError:  # the store ended with rank 0, which has said why
                self.complain(f"preflight: rank {environment.rank}: rank 0 is gone")
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
            stages = self._resolved_here(meeting.environment)
        except MythosError as error:
            self.complain(f"error: {error.report()}")
            return _part(meeting, USER_ERROR_EXIT_CODE)
        token = uuid.uuid4().hex[:12]
        checks: list[Check] = []
        with host_facts.Markers(self.run_dir, stages, token) as markers:
            checks += [Check("run directory", False, places(markers.problems))] if markers.problems else []
            hosts = self._looked(meeting, checks, stages, None if markers.problems else token)
        code = self._report(checks, hosts, processes)
        return _part(meeting, code)

    def _looked(
        self, meeting: "Meeting", checks: list[Check], stages: Sequence[ResolvedStage], token: str | None
    ) -> list[str]:
        """Appends to `checks` until a stage fails in a way that makes the next one pointless; returns the hosts."""
        from mythos_ds.cluster.preflight import devices
        from mythos_ds.cluster.preflight.rendezvous import nodes_of

        found = self._stage("facts", token, meeting, checks)
        if found is None:
            return ["?"]
        hosts = [fact["host"] for fact in found]
        checks += host_facts.verdicts(found, stages)
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
        checks.append(devices.outside_verdict(found, names, outside_bytes(stages[0].run)))
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
                stages = self._resolved_here(meeting.environment)
                one_of_host = meeting.environment.local_rank == 0
                return host_facts.gather(stages, self.run_dir, announced or None, write=one_of_host)
            if stage == "device":
                return _device(meeting)
            environment, run = meeting.environment, self._resolved_here(meeting.environment)[0].run
            started = run.world_size == environment.world_size  # and not one process of a planned cluster
            return _links(meeting, announced, run if started else None)
        except Exception as error:
            message = str(error).splitlines() or [""]
            return {"error": f"{type(error).__name__}: {message[0]}"}


def _device(meeting: "Meeting") -> host_facts.HostFacts:
    from mythos_ds.cluster.preflight import devices
    from mythos_ds.parallel.groups import select_device

    return devices.device_facts(select_device(meeting.environment))


def _links(meeting: "Meeting", nodes: dict[str, list[int]], run: ResolvedRun | None) -> host_facts.HostFacts:
    from mythos_ds.cluster.preflight import devices
    from mythos_ds.parallel.groups import select_device

    device = select_device(meeting.environment)
    limit_s = meeting.left_s * GROUP_SHARE
    devices.open_group(meeting.environment, device, meeting.store, limit_s)
    offsets = devices.clock_offset(device)
    return {
        "device": device.type,
        "offsets": offsets,
        "speeds": devices.link_speeds(devices.Links.of(nodes), device, limit_s),
        **(_memory_outside(meeting, run, device, limit_s) if run is not None else {}),
    }


def _memory_outside(meeting: "Meeting", run: ResolvedRun, device: Any, limit_s: float) -> host_facts.HostFacts:
    from mythos_ds.cluster.preflight import devices

    environment = meeting.environment
    per_node = environment.local_world_size
    choice = choose_dispatch(run.config.parallel.dispatch, run.ep_size, per_node, device.type)
    by_node = per_node if choice.name == "per_node" and not dispatch_problem(run.config, run.ep_size, per_node) else 0
    return devices.memory_outside(run.layout(environment.rank), device, limit_s, by_node)


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
