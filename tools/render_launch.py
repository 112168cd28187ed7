"""Write the file that starts training on a cluster: for Slurm, Kubernetes, torchrun or Open MPI.

Slurm's and Kubernetes' have the nodes and GPUs of the configuration's `cluster` section. The files in launch/ are the
templates. What they read from each other is put in, so that what is written needs no other file; a comment "#= name"
marks a line that gets another value, and options of #SBATCH are found by their name.
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

from mythos_ds.cluster.job_files import SCRIPTS, Job, KubernetesJob, SlurmJob, render_script
from mythos_ds.mains import run_tool, tool_parser


def render(options: Namespace) -> str:
    """The file that a command line asks for. Raises ConfigError for a configuration or option that does not fit."""
    if options.kind in SCRIPTS:
        return render_script(SCRIPTS[options.kind])
    kind: type[Job] = options.job
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)}).render()


def work(options: Namespace) -> None:
    """Render and write. Raises ConfigError."""
    text = render(options)
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, encoding="utf-8")


def parser() -> ArgumentParser:
    """The command line."""
    main = tool_parser(__doc__ or "", "mythos-ds render-launch slurm --config 1t.json > 1t.sbatch")
    kinds = main.add_subparsers(required=True, dest="kind", metavar="slurm|kubernetes|" + "|".join(SCRIPTS))
    slurm = kinds.add_parser("slurm", help="a batch script")
    slurm.add_argument(
        "--time", default="24:00:00", help="of one job, as 24:00:00 or 2-00:00:00; the run goes on in the next"
    )
    slurm.add_argument("--partition", help="where to queue")
    slurm.add_argument("--cpus", type=int, default=12, help="cores per GPU")
    slurm.add_argument("--account", help="whom the time is charged to")
    slurm.add_argument("--qos", help="quality of service")
    slurm.add_argument("--constraint", help='features of the nodes, such as "h100&ib"')
    slurm.add_argument("--array", help="tasks such as 0-7 or 0-9%%1; %%a in the arguments is a task's number")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; several times"
    )
    slurm.set_defaults(job=SlurmJob)
    kubernetes = kinds.add_parser("kubernetes", help="a headless service and an Indexed Job")
    kubernetes.add_argument("--image", required=True, help="in which this package is installed")
    kubernetes.add_argument("--claim", required=True, help="persistent volume claim that all pods share")
    kubernetes.add_argument("--mount", default="/shared", help="where the claim appears")
    kubernetes.add_argument("--restarts", type=int, default=3, help="failures of the run until the Job fails")
    kubernetes.set_defaults(job=KubernetesJob)
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
