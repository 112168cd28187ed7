"""Write the file that starts training on a cluster: for Slurm, Kubernetes, torchrun or Open MPI.

Slurm's and Kubernetes' have the nodes and GPUs of the configuration's `cluster` section. The files in launch/ are the
templates. What they read from each other is put in, so that what is written needs no other file; a comment "#= name"
marks a line that gets another value, and options of #SBATCH are found by their name.
"""

import json
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.config.schema import ClusterConfig
from mythos_ds.errors import ConfigError
from mythos_ds.mains import run_tool, tool_parser
from mythos_ds.train.run_directory import default_run_directory

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SHUTDOWN_S = 30
"""What is left of the time to go after torchrun's processes have had theirs."""
_MARKED = re.compile(r"^(?P<head>\s*(?:- )?[\w./-]+(?:: |=))(?P<old>.*?) #= (?P<name>\w+)$")
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
_PARTITION = re.compile(r"[\w.,-]+")
_SOURCED = re.compile(r"(?m)^\. launch/(\w+\.sh)\n")
_TO_CHECKOUT = re.compile(r'(?m)^cd "\$\(dirname "\$0"\)/\.\.".*\n')
_ENVIRONMENT = "environment.sh"
SCRIPTS = {"torchrun": "torchrun.sh", "mpirun": "mpirun.sh", "environment": _ENVIRONMENT}
"""What is rendered without a configuration, which the script gets as its argument."""


def render_script(options: Namespace) -> str:
    """A script of launch/ that runs in any folder."""
    return _alone(SCRIPTS[options.kind])


def _alone(name: str) -> str:
    """A file of launch/ with those that it reads put in."""
    text = (LAUNCH / name).read_text(encoding="utf-8")
    text = _TO_CHECKOUT.sub("", text).replace(f"launch/{name}", name)
    return _SOURCED.sub(lambda match: _alone(match[1]), text)


def render_slurm(cluster: ClusterConfig, options: Namespace) -> str:
    """launch/slurm.sbatch for the cluster."""
    if not _TIME.fullmatch(options.time):
        raise ConfigError(f"--time: given {options.time!r}; allowed: HH:MM:SS or D-HH:MM:SS; nearest: 24:00:00")
    limit = _seconds(options.time)
    if not 0 < options.grace < limit:
        raise ConfigError(f"--grace: given {options.grace}; allowed: 1 to {limit - 1} s, below --time; nearest: 300")
    if options.cpus < 1:
        raise ConfigError(f"--cpus: given {options.cpus}; allowed: 1 or more; nearest: 1")
    if options.partition is not None and not _PARTITION.fullmatch(options.partition):
        raise ConfigError(f"--partition: given {options.partition!r}; allowed: letters, digits, '_', '-', '.' and ','")
    wanted = {
        "job-name": options.name,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus_per_node,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": options.cpus,
        "time": options.time,
        "signal": f"B:USR1@{options.grace}",
    }
    text = _alone("slurm.sbatch")
    for name, value in wanted.items():
        text, found = re.subn(rf"(?m)^#SBATCH --{name}=.*$", f"#SBATCH --{name}={value}", text)
        assert found == 1, name
    if options.partition:
        text = text.replace("#SBATCH --requeue\n", f"#SBATCH --requeue\n#SBATCH --partition={options.partition}\n")
    return _fill(text, {"arguments": f"({shlex.join(_arguments(options))})"})


def _seconds(text: str) -> int:
    days, hours, minutes, seconds = (int(part or 0) for part in _TIME.fullmatch(text).groups())  # type: ignore[union-attr]
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def render_kubernetes(cluster: ClusterConfig, options: Namespace) -> str:
    """launch/kubernetes.yaml for the cluster."""
    if not options.mount.startswith("/"):
        raise ConfigError(f"--mount: given {options.mount!r}; allowed: a path from the root; nearest: /{options.mount}")
    if options.restarts < 0:
        raise ConfigError(f"--restarts: given {options.restarts}; allowed: 0 or more; nearest: 0")
    if options.grace <= SHUTDOWN_S:
        raise ConfigError(f"--grace: given {options.grace}; allowed: more than {SHUTDOWN_S} s; nearest: 300")
    values = {
        "name": options.name,
        "nodes": cluster.nodes,
        "nodes_text": str(cluster.nodes),
        "gpus": cluster.gpus_per_node,
        "gpus_text": str(cluster.gpus_per_node),
        # When one pod fails, all others do.
        "failures": options.restarts * cluster.nodes,
        "grace": options.grace,
        "shutdown_text": str(options.grace - SHUTDOWN_S),
        "image": options.image,
        "arguments": _arguments(options, f"{options.mount}/{_run_directory(options)}"),
        "master": f"{options.name}-0.{options.name}",
        "mount": options.mount,
        "claim": options.claim,
    }
    # JSON values are YAML values.
    text = (LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8")
    return _fill(text, {name: json.dumps(value) for name, value in values.items()})


def _fill(text: str, values: dict[str, str]) -> str:
    """Every marked line with its value; values and marks must match exactly."""
    used = set()

    def line(match: re.Match[str]) -> str:
        used.add(match["name"])
        return match["head"] + values[match["name"]]

    lines = [_MARKED.sub(line, one) for one in text.splitlines()]
    assert used == set(values), used ^ set(values)
    return "\n".join(lines) + "\n"


def _arguments(options: Namespace, default_run_dir: str | None = None) -> list[str]:
    """Those of training."""
    run_dir = options.run_dir or default_run_dir
    return ["--config", options.config, *(["--run-dir", run_dir] if run_dir else []), *options.overrides]


def _run_directory(options: Namespace) -> Path:
    return default_run_directory(load_config(options.config, options.overrides))


def _cluster(options: Namespace) -> ClusterConfig:
    config = load_config(options.config, options.overrides).config
    if config.cluster is None:
        raise ConfigError('cluster: missing; needed: {"gpu": "h100", "nodes": 16, "gpus_per_node": 8} or the like')
    resolve(config, planned_world_size(config))
    return config.cluster


def work(options: Namespace) -> None:
    """Render and write. Raises ConfigError for a configuration or option that does not fit."""
    text = render_script(options) if options.kind in SCRIPTS else render_job(options)
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, encoding="utf-8")


def render_job(options: Namespace) -> str:
    """The file of a batch system. Raises ConfigError for a configuration or option that does not fit."""
    if not _DNS_LABEL.fullmatch(options.name):
        raise ConfigError(f"--name: given {options.name!r}; allowed: small letters, digits and '-'; nearest: mythos")
    text: str = options.render(_cluster(options), options)
    return text


def parser() -> ArgumentParser:
    """The command line."""
    main = tool_parser(__doc__ or "", "mythos-ds render-launch slurm --config 1t.json > 1t.sbatch")
    kinds = main.add_subparsers(required=True, dest="kind", metavar="slurm|kubernetes|" + "|".join(SCRIPTS))
    slurm = kinds.add_parser("slurm", help="a batch script")
    slurm.add_argument("--time", default="24:00:00", help="of one job; the run goes on in the next")
    slurm.add_argument("--partition", help="where to queue")
    slurm.add_argument("--cpus", type=int, default=12, help="cores per GPU")
    slurm.set_defaults(render=render_slurm)
    kubernetes = kinds.add_parser("kubernetes", help="a headless service and an Indexed Job")
    kubernetes.add_argument("--image", required=True, help="in which this package is installed")
    kubernetes.add_argument("--claim", required=True, help="persistent volume claim that all pods share")
    kubernetes.add_argument("--mount", default="/shared", help="where the claim appears")
    kubernetes.add_argument("--restarts", type=int, default=3, help="failures of the run until the Job fails")
    kubernetes.set_defaults(render=render_kubernetes)
    for kind in (slurm, kubernetes):
        kind.add_argument("--config", required=True, help="as the nodes find it: a path, or a preset such as 1t.json")
        kind.add_argument("--run-dir", help="default: that of training, in Kubernetes below --mount")
        kind.add_argument("--name", default="mythos", help="of the job")
        kind.add_argument("--grace", type=int, default=300, help="seconds for the last step and its checkpoint")
        kind.add_argument("--output", type=Path, help="default: standard output")
        kind.add_argument("overrides", nargs="*", metavar="section.key=value")
    for name in SCRIPTS:
        script = kinds.add_parser(name, help=f"{name}.sh, for any configuration; it says how it is used")
        script.add_argument("--output", type=Path, help="default: standard output")
    return main


if __name__ == "__main__":
    sys.exit(run_tool(parser(), work, None))
