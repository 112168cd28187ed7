"""The file that starts training on a cluster: a template of launch/ for Slurm, Kubernetes, torchrun or Open MPI.

What the templates read from each other is put in, so that what is written needs no other file; a comment "#= name"
marks a line that gets another value, and options of #SBATCH are found by their name. No torch.
"""

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve_stages
from mythos_ds.config.schema import ClusterConfig
from mythos_ds.errors import ConfigError, OptionError
from mythos_ds.train.run_directory import default_run_directory

SHUTDOWN_S = 30
"""What is left of the time to go after torchrun's processes have had theirs."""
SCRIPTS = {"torchrun": "torchrun.sh", "mpirun": "mpirun.sh", "environment": "environment.sh"}
"""What is rendered without a configuration, which the script gets as its argument."""
_MARKED = re.compile(r"^(?P<head>\s*(?:- )?[\w./-]+(?:: |=))(?P<old>.*?) #= (?P<name>\w+)$")
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
_TIMES = (
    r"(?P<minutes>\d{1,7})(:(?P<seconds>[0-5]?\d))?",
    r"(?P<hours>\d{1,5}):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)",
    r"(?P<days>\d{1,4})-(?P<hours>1?\d|2[0-3]|0\d)(:(?P<minutes>[0-5]?\d)(:(?P<seconds>[0-5]?\d))?)?",
)
"""Slurm's ways to write a time."""
_NAME = re.compile(r"[\w.@+-]+(,[\w.@+-]+)*", re.ASCII)
_ARRAY = re.compile(
    r"(\d{1,7}(-\d{1,7}(:[1-9]\d{0,6})?)?)(,\d{1,7}(-\d{1,7}(:[1-9]\d{0,6})?)?)*(%(?P<at_once>[1-9]\d{0,6}))?",
    re.ASCII,
)
_KEY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PLAIN = re.compile(r"[\w.,:/@%+=-]*", re.ASCII)
_MOST_CPUS = 1 << 16
"""Slurm holds cores per task in 16 bits."""
_MOST_FAILURES = 2**31 - 1
"""Kubernetes holds backoffLimit in 32 bits."""
_LONGEST_GRACE_S = 2_000_000
_OWN = {
    "job-name": "--name",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.gpus_per_node",
    "ntasks-per-node": "cluster.gpus_per_node",
    "ntasks-per-gpu": "cluster.gpus_per_node",
    "gpus": "cluster.nodes and cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "--cpus",
    "time": "--time",
    "signal": "--grace",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
    "array": "--array",
    "requeue": "nothing: it is always given",
    "no-requeue": "nothing: a run goes on in the job's next start",
    "open-mode": "nothing: it is always append",
    "wrap": "another file: this one is the script",
}
"""What `--sbatch` does not take, and what says it instead."""
_ARRAY_TASK = "%a"
"""In arguments: the number of an array's task."""
_SHOWN_CHARACTERS = 80
_SOURCED = re.compile(r"(?m)^\. launch/(\w+\.sh)\n")
_TO_CHECKOUT = re.compile(r'(?m)^cd "\$\(dirname "\$0"\)/\.\.".*\n')


@dataclass(frozen=True)
class Job(ABC):
    """A run of training as a job of a batch system, which has the nodes and GPUs of the configuration's `cluster`."""

    config: str
    """As the nodes find it: a path, or a preset."""
    overrides: Sequence[str]
    run_dir: str | None
    name: str
    grace: int
    """Seconds for the last step and its checkpoint."""

    def render(self) -> str:
        """Writes the job's file. Raises ConfigError, by the command's option, for a configuration or value that does
        not fit."""
        if not _DNS_LABEL.fullmatch(self.name):
            raise OptionError(
                f"--name: given {_shown(self.name)}; allowed: small letters, digits and '-'; nearest: mythos"
            )
        return self._render(self._cluster())

    @abstractmethod
    def _render(self, cluster: ClusterConfig) -> str:
        """The file for a cluster."""

    def _cluster(self) -> ClusterConfig:
        loaded = load_config(self.config, self.overrides)
        config = loaded.config
        if config.cluster is None:
            raise ConfigError('cluster: missing; needed: {"gpu": "h100", "nodes": 16, "gpus_per_node": 8} or the like')
        resolve_stages(loaded.stages, planned_world_size(config))
        return config.cluster

    def _arguments(self, default_run_dir: str | None = None) -> list[str]:
        """Those of training. ConfigError for what no file of text can hold."""
        run_dir = self.run_dir or default_run_dir
        arguments = ["--config", self.config, *(["--run-dir", run_dir] if run_dir else []), *self.overrides]
        for argument in arguments:
            _require_text("an argument of training", argument)
        return arguments


@dataclass(frozen=True)
class SlurmJob(Job):
    """A batch script, launch/slurm.sbatch."""

    time: str
    """Limit of one job; the run goes on in the next."""
    partition: str | None
    cpus: int
    """Cores per GPU."""
    account: str | None
    qos: str | None
    constraint: str | None
    """Features of the nodes."""
    array: str | None
    """Numbers of an array's tasks; `%a` in the arguments is a task's."""
    sbatch: Sequence[str]
    """Further options of sbatch, as key=value."""

    def _cluster(self) -> ClusterConfig:
        if self.array is None:
            return super()._cluster()
        first = re.split(r"\D", self.array)[0]  # the settings of its first task stand for all
        overrides = [override.replace(_ARRAY_TASK, first) for override in self.overrides]
        return Job._cluster(replace(self, overrides=overrides, array=None))

    def _render(self, cluster: ClusterConfig) -> str:
        self._check()
        further = self._further()
        wanted = {
            "job-name": self.name,
            "nodes": cluster.nodes,
            "ntasks-per-node": cluster.gpus_per_node,
            "gpus-per-node": cluster.gpus_per_node,
            "cpus-per-task": self.cpus,
            "time": self.time,
            "signal": f"B:USR1@{self.grace}",
        }
        text = render_script("slurm.sbatch")
        for name, value in wanted.items():
            text, found = re.subn(rf"(?m)^#SBATCH --{name}=.*$", f"#SBATCH --{name}={value}", text)
            assert found == 1, name
        more = "".join(f"#SBATCH {option}\n" for option in further)
        text = text.replace("#SBATCH --requeue\n", "#SBATCH --requeue\n" + more)
        return _fill(text, {"arguments": f"({shlex.join(self._arguments())})"})

    def _check(self) -> None:
        limit = _seconds(self.time)
        if not limit:
            allowed = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, above 0"
            raise OptionError(f"--time: given {_shown(self.time)}; allowed: {allowed}; nearest: 24:00:00")
        if not 0 < self.grace < limit:
            raise OptionError(f"--grace: given {self.grace}; allowed: 1 to {limit - 1} s, below --time; nearest: 300")
        if not 1 <= self.cpus < _MOST_CPUS:
            nearest = 1 if self.cpus < 1 else _MOST_CPUS - 1
            raise OptionError(f"--cpus: given {self.cpus}; allowed: 1 to {_MOST_CPUS - 1}; nearest: {nearest}")
        for option in ("partition", "account", "qos"):
            value = getattr(self, option)
            if value is not None and not _NAME.fullmatch(value):
                allowed = "names of letters, digits, '_', '-', '.', '@' and '+', with ',' between them"
                raise OptionError(f"--{option}: given {_shown(value)}; allowed: {allowed}")
        if self.array is not None:
            self._check_array(self.array)

    def _check_array(self, array: str) -> None:
        match = _ARRAY.fullmatch(array)
        if match is None:
            allowed = "numbers and ranges such as 0-7, 1,3,5 or 0-30:10, with %n for n at once"
            raise OptionError(f"--array: given {_shown(array)}; allowed: {allowed}")
        backwards = [
            part for part in re.findall(r"\d+-\d+", array) if int(part.split("-")[0]) > int(part.split("-")[1])
        ]
        if backwards:
            first, last = backwards[0].split("-")
            raise OptionError(f"--array: given {array}; allowed: rising ranges; nearest: {last}-{first}")
        several = not re.fullmatch(r"\d+(%\d+)?", array) and match["at_once"] != "1"
        if several and _ARRAY_TASK not in (self.run_dir or ""):
            raise OptionError(
                f"--array: given {array}, whose tasks run at once, in one run directory; allowed: one for each, "
                f"such as --run-dir runs/{self.name}-{_ARRAY_TASK}, or one after the other: {array.partition('%')[0]}%1"
            )

    def _further(self) -> list[str]:
        """The options that the template has not. ConfigError."""
        given = {"partition": self.partition, "account": self.account, "qos": self.qos, "array": self.array}
        options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        if self.constraint is not None:
            options.append(f"--constraint={_directive_value('--constraint', self.constraint)}")
        seen: set[str] = set()
        for pair in self.sbatch:
            key, equals, value = pair.partition("=")
            key = key.removeprefix("--")
            if not _KEY.fullmatch(key):
                raise OptionError(
                    f"--sbatch: given {_shown(pair)}; allowed: key=value, or key, of sbatch's long options"
                )
            if key in _OWN:
                raise OptionError(f"--sbatch: given {_shown(pair)}; {key} is said by {_OWN[key]}")
            if key in seen:
                raise OptionError(f"--sbatch: {key} is given twice")
            seen.add(key)
            options.append(f"--{key}={_directive_value(f'--sbatch {key}', value)}" if equals else f"--{key}")
        return options


@dataclass(frozen=True)
class KubernetesJob(Job):
    """A headless service and an Indexed Job, launch/kubernetes.yaml."""

    image: str
    """Has this package installed."""
    claim: str
    """Persistent volume claim that all pods share."""
    mount: str
    """Where the claim appears."""
    restarts: int
    """Failures of the run until the Job fails."""

    def _render(self, cluster: ClusterConfig) -> str:
        self._check(cluster.nodes)
        run_dir = default_run_directory(load_config(self.config, self.overrides))
        values = {
            "name": self.name,
            "nodes": cluster.nodes,
            "nodes_text": str(cluster.nodes),
            "gpus": cluster.gpus_per_node,
            "gpus_text": str(cluster.gpus_per_node),
            # When one pod fails, all others do.
            "failures": self.restarts * cluster.nodes,
            "grace": self.grace,
            "shutdown_text": str(self.grace - SHUTDOWN_S),
            "image": self.image,
            "master": f"{self.name}-0.{self.name}",
            "mount": self.mount,
            "claim": self.claim,
        }
        values["arguments"] = [_unexpanded(argument) for argument in self._arguments(f"{self.mount}/{run_dir}")]
        text = (_templates() / "kubernetes.yaml").read_text(encoding="utf-8")
        return _fill(text, {name: _yaml(value) for name, value in values.items()})

    def _check(self, nodes: int) -> None:
        for option in ("image", "claim", "mount"):
            value = getattr(self, option)
            _require_text(f"--{option}", value)
            if not value.strip():
                raise OptionError(f"--{option}: given {value!r}; allowed: a name")
        if not self.mount.startswith("/"):
            nearest = _shown("/" + self.mount)
            raise OptionError(f"--mount: given {_shown(self.mount)}; allowed: a path from the root; nearest: {nearest}")
        most = _MOST_FAILURES // nodes
        if not 0 <= self.restarts <= most:
            bound = 0 if self.restarts < 0 else most
            raise OptionError(f"--restarts: given {self.restarts}; allowed: 0 to {most}; nearest: {bound}")
        if not SHUTDOWN_S < self.grace <= _LONGEST_GRACE_S:
            allowed = f"{SHUTDOWN_S + 1} to {_LONGEST_GRACE_S} s"
            raise OptionError(f"--grace: given {self.grace}; allowed: {allowed}; nearest: 300")


def render_script(name: str) -> str:
    """Writes a file of launch/ with those that it reads put in, to be run in any folder."""
    text = (_templates() / name).read_text(encoding="utf-8")
    text = _TO_CHECKOUT.sub("", text).replace(f"launch/{name}", name)
    return _SOURCED.sub(lambda match: render_script(match[1]), text)


def _templates() -> Path:
    """The folder launch/: beside the package in a checkout, inside it where it is installed."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "launch"
    return inside if inside.is_dir() else package.parent / "launch"


def _seconds(text: str) -> int:
    """Of a time in one of Slurm's ways; 0 for what is none."""
    for way in _TIMES:
        if match := re.fullmatch(way, text, re.ASCII):
            parts = match.groupdict()
            days, hours, minutes, seconds = (
                int(parts.get(name) or 0) for name in ("days", "hours", "minutes", "seconds")
            )
            return ((24 * days + hours) * 60 + minutes) * 60 + seconds
    return 0


def _require_text(what: str, value: str) -> None:
    """Raises ConfigError for what cannot be written into a file of text, or stand in a command line."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: given {_shown(value)}; allowed: text in UTF-8") from None
    if "\0" in value:
        raise ConfigError(f"{what}: given {_shown(value)}; allowed: text without null bytes")


def _directive_value(what: str, value: str) -> str:
    """A value as sbatch reads it in a line of #SBATCH: quotes, and a backslash before what would end them."""
    _require_text(what, value)
    if not value.isprintable():
        raise ConfigError(f"{what}: given {_shown(value)}; allowed: one line of letters that can be printed")
    if value and _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unexpanded(argument: str) -> str:
    """An argument that Kubernetes hands on as it is: it would put variables in for "$(NAME)", and "$" for "$$"."""
    return argument.replace("$", "$$") if "$(" in argument or "$$" in argument else argument


def _yaml(value: Any) -> str:
    """A value as YAML: JSON is YAML, but for letters beyond ASCII."""
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    return '"' + "".join(_yaml_letter(letter) for letter in value) + '"'


def _yaml_letter(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    return letter if letter.isprintable() and letter != "\ufeff" else f"\\U{ord(letter):08X}"


def _shown(value: str) -> str:
    text = ascii(value) if not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _fill(text: str, values: dict[str, str]) -> str:
    """Every marked line with its value; values and marks must match exactly."""
    used = set()

    def line(match: re.Match[str]) -> str:
        used.add(match["name"])
        return match["head"] + values[match["name"]]

    lines = [_MARKED.sub(line, one) for one in text.splitlines()]
    assert used == set(values), used ^ set(values)
    return "\n".join(lines) + "\n"
