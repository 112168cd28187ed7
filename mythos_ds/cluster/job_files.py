"""The file that starts training on a cluster: a template of launch/ for Slurm, Kubernetes, torchrun or Open MPI.

What the templates read from each other is put in, so that what is written needs no other file; a comment "#= name"
marks a line that gets another value, and options of #SBATCH are found by their name. No torch.
"""

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.config.schema import ClusterConfig
from mythos_ds.errors import ConfigError
from mythos_ds.train.run_directory import default_run_directory

SHUTDOWN_S = 30
"""What is left of the time to go after torchrun's processes have had theirs."""
SCRIPTS = {"torchrun": "torchrun.sh", "mpirun": "mpirun.sh", "environment": "environment.sh"}
"""What is rendered without a configuration, which the script gets as its argument."""
_MARKED = re.compile(r"^(?P<head>\s*(?:- )?[\w./-]+(?:: |=))(?P<old>.*?) #= (?P<name>\w+)$")
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
_PARTITION = re.compile(r"[\w.,-]+")
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
            raise ConfigError(f"--name: given {self.name!r}; allowed: small letters, digits and '-'; nearest: mythos")
        return self._render(self._cluster())

    @abstractmethod
    def _render(self, cluster: ClusterConfig) -> str:
        """The file for a cluster."""

    def _cluster(self) -> ClusterConfig:
        config = load_config(self.config, self.overrides).config
        if config.cluster is None:
            raise ConfigError('cluster: missing; needed: {"gpu": "h100", "nodes": 16, "gpus_per_node": 8} or the like')
        resolve(config, planned_world_size(config))
        return config.cluster

    def _arguments(self, default_run_dir: str | None = None) -> list[str]:
        """Those of training."""
        run_dir = self.run_dir or default_run_dir
        return ["--config", self.config, *(["--run-dir", run_dir] if run_dir else []), *self.overrides]


@dataclass(frozen=True)
class SlurmJob(Job):
    """A batch script, launch/slurm.sbatch."""

    time: str
    """Limit of one job; the run goes on in the next."""
    partition: str | None
    cpus: int
    """Cores per GPU."""

    def _render(self, cluster: ClusterConfig) -> str:
        self._check()
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
        if self.partition:
            text = text.replace("#SBATCH --requeue\n", f"#SBATCH --requeue\n#SBATCH --partition={self.partition}\n")
        return _fill(text, {"arguments": f"({shlex.join(self._arguments())})"})

    def _check(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise ConfigError(f"--time: given {self.time!r}; allowed: HH:MM:SS or D-HH:MM:SS; nearest: 24:00:00")
        limit = _seconds(self.time)
        if not 0 < self.grace < limit:
            raise ConfigError(f"--grace: given {self.grace}; allowed: 1 to {limit - 1} s, below --time; nearest: 300")
        if self.cpus < 1:
            raise ConfigError(f"--cpus: given {self.cpus}; allowed: 1 or more; nearest: 1")
        if self.partition is not None and not _PARTITION.fullmatch(self.partition):
            allowed = "letters, digits, '_', '-', '.' and ','"
            raise ConfigError(f"--partition: given {self.partition!r}; allowed: {allowed}")


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
        self._check()
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
            "arguments": self._arguments(f"{self.mount}/{run_dir}"),
            "master": f"{self.name}-0.{self.name}",
            "mount": self.mount,
            "claim": self.claim,
        }
        # JSON values are YAML values.
        text = (_templates() / "kubernetes.yaml").read_text(encoding="utf-8")
        return _fill(text, {name: json.dumps(value) for name, value in values.items()})

    def _check(self) -> None:
        if not self.mount.startswith("/"):
            raise ConfigError(f"--mount: given {self.mount!r}; allowed: a path from the root; nearest: /{self.mount}")
        if self.restarts < 0:
            raise ConfigError(f"--restarts: given {self.restarts}; allowed: 0 or more; nearest: 0")
        if self.grace <= SHUTDOWN_S:
            raise ConfigError(f"--grace: given {self.grace}; allowed: more than {SHUTDOWN_S} s; nearest: 300")


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
    days, hours, minutes, seconds = (int(part or 0) for part in _TIME.fullmatch(text).groups())  # type: ignore[union-attr]
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _fill(text: str, values: dict[str, str]) -> str:
    """Every marked line with its value; values and marks must match exactly."""
    used = set()

    def line(match: re.Match[str]) -> str:
        used.add(match["name"])
        return match["head"] + values[match["name"]]

    lines = [_MARKED.sub(line, one) for one in text.splitlines()]
    assert used == set(values), used ^ set(values)
    return "\n".join(lines) + "\n"
