"""The files that start training: their syntax, what is rendered into them, and what they do when a run is stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.errors import ConfigError
from tests.helpers.distributed import free_port
from tests.helpers.mains import load_main
from tests.helpers.pretrain import ROOT, SMALL, environment, metrics, small_data

render_launch = load_main("tools/render_launch.py")

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STARTERS = [LAUNCH / name for name in ("torchrun.sh", "mpirun.sh", "slurm.sbatch")]
SLURM = ["slurm", "--config", "1t.json"]
KUBERNETES = ["kubernetes", "--config", "1t.json", "--image", "registry/mythos:1", "--claim", "disk"]


def _render(arguments: list[str]) -> str:
    text: str = render_launch.render(render_launch.parser().parse_args(arguments))
    return text


@pytest.mark.parametrize(
    ("ep_size", "gpus", "nearest"),
    [(1, 8, None), (4, 8, None), (256, 8, None), ("auto", 6, None), (16, 6, "2"), (8, 12, "4"), (64, 48, "16")],
)
def test_expert_groups_lie_inside_a_node_or_cover_whole_ones(ep_size, gpus, nearest):
    overrides = [f"parallel.ep_size={json.dumps(ep_size)}", f"cluster.gpus_per_node={gpus}"]
    overrides += ["parallel.dispatch=auto", "parallel.overlap=false"]
    if nearest is None:
        assert load_config("1t.json", overrides).config.parallel.ep_size == ep_size
        return
    with pytest.raises(ConfigError, match=r"parallel\.ep_size") as caught:
        load_config("1t.json", overrides)
    assert str(caught.value).endswith(f"divisors and multiples of {gpus}; nearest: {nearest}")


NODES = ["cluster.nodes=8", "cluster.gpus_per_node=8", "training.micro_batch_size=1", "training.global_batch_size=448"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.pp_size=[4,56,4]", "parallel.ep_size=8"], "allowed: a first stage of a multiple of 8 processes"),
        (["parallel.pp_size=[8,48,8]", "parallel.ep_size=8", "training.global_batch_size=480"], None),
        (["parallel.pp_size=2", "cluster.nodes=3", "training.global_batch_size=144"], "stages of whole nodes"),
        (["model.n_experts=100", "cluster.nodes=5", "training.global_batch_size=320"], None),
    ],
)
def test_stages_and_their_expert_groups_know_the_nodes(overrides, message):
    ep_size = [] if any("ep_size" in one for one in overrides) else ["parallel.ep_size=auto"]
    config = load_config("10b.json", [*NODES, *ep_size, *overrides]).config
    if message is None:
        resolved = resolve(config, planned_world_size(config))
        assert 8 % resolved.ep_size == 0 or resolved.ep_size % 8 == 0
        return
    with pytest.raises(ConfigError, match=r"parallel\.pp_size") as caught:
        resolve(config, planned_world_size(config))
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert path not in STARTERS[:2] or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.name)
def test_every_starter_takes_the_common_environment(path):
    assert ". launch/environment.sh\n" in path.read_text()


def test_the_environment_keeps_what_is_set_and_writes_deepspeeds_file():
    file = LAUNCH / "environment.sh"
    lines = file.read_text().splitlines()
    exports = [i for i, line in enumerate(lines) if line.startswith("export ")]
    names = [lines[i].split("=")[0].removeprefix("export ") for i in exports]
    assert all(lines[i - 1].startswith(("#", "export ")) for i in exports), "every setting says what it is for"
    bare = {"PATH": os.environ["PATH"], "INTERFACE": "ib0", "NCCL_DEBUG": "INFO", "OTHER": "x"}
    out = subprocess.run(["bash", str(file)], env=bare, capture_output=True, text=True, check=True).stdout
    # DeepSpeed splits every line at its first "=": no comments, no empty lines.
    values = dict(line.split("=", maxsplit=1) for line in out.splitlines())
    assert set(values) == {*names, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert (values["NCCL_DEBUG"], values["GLOO_SOCKET_IFNAME"]) == ("INFO", "ib0")


def test_slurm_is_rendered_from_the_cluster(tmp_path):
    rendered = _render([*SLURM, "--run-dir", "/disk/a run", "--grace", "600", "--", "training.seed=7"])
    directives = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(\S+))?$", rendered))
    assert directives == {
        "job-name": "mythos",
        "nodes": "128",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "time": "24:00:00",
        "requeue": "",
        "open-mode": "append",
        "signal": "B:USR1@600",
    }
    assert "arguments=(--config 1t.json --run-dir '/disk/a run' training.seed=7)\n" in rendered
    assert "#=" not in rendered
    assert "launch/" not in rendered, "it needs no other file"
    path = tmp_path / "job"
    path.write_text(rendered)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_kubernetes_is_rendered_from_the_cluster():
    yaml = pytest.importorskip("yaml")
    rendered = _render([*KUBERNETES, "--name", "big", "--restarts", "2", "data.data_dir=/shared/data"])
    service, job = yaml.safe_load_all(rendered)
    _check_service_and_job(service, job)
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    assert (spec["completions"], spec["backoffLimit"]) == (128, 256)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["image"] == "registry/mythos:1"
    run = ["--run-dir", "/shared/runs/1t"]
    assert container["args"] == ["--config", "1t.json", *run, "data.data_dir=/shared/data"]
    assert "/shared/runs/1t-ep64" in _render([*KUBERNETES, "parallel.ep_size=64"])
    assert job["metadata"]["name"] == "big"
    assert "mythos" not in rendered.split("apiVersion", 1)[1].replace("registry/mythos", "").replace("mythos_ds", "")
    assert not re.search(r"#= \w+$", rendered, re.M)


def test_the_kubernetes_file_is_valid_as_it_is():
    yaml = pytest.importorskip("yaml")
    _check_service_and_job(*yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def _check_service_and_job(service: dict, job: dict) -> None:
    """The API's required fields, and what the two objects must agree on."""
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    name, spec = job["metadata"]["name"], job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = spec["template"]["spec"]
    assert set(spec) == {
        *("completionMode", "completions", "parallelism", "backoffLimit"),
        *("podReplacementPolicy", "podFailurePolicy", "template"),
    }
    assert spec["completions"] == spec["parallelism"]
    # The API takes a podFailurePolicy only with these.
    assert (pod["restartPolicy"], spec["podReplacementPolicy"]) == ("Never", "Failed")
    containers = {container["name"]: container for container in pod["containers"]}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore")
        codes = rule.get("onExitCodes", {"containerName": "train", "operator": "In", "values": [1]})
        assert codes["containerName"] in containers
        assert 0 not in codes["values"]
    train = containers["train"]
    variables = {variable["name"]: variable["value"] for variable in train["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    assert int(variables["NNODES"]) == spec["completions"]
    assert int(variables["NPROC"]) == train["resources"]["limits"]["nvidia.com/gpu"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["ports"][0]["port"] == train["ports"][0]["containerPort"]
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shell, flag, script, name = train["command"]
    assert (shell, flag, name) == ("bash", "-c", "torchrun.sh")
    assert "mythos_ds render-launch torchrun" in script
    labels = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]["labelSelector"]
    assert labels["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", sorted(render_launch.SCRIPTS))
def test_a_rendered_script_needs_no_other_file(kind, tmp_path):
    path = tmp_path / render_launch.SCRIPTS[kind]
    assert _main([kind, "--output", str(path)]) == 0
    subprocess.run(["bash", "-n", str(path)], check=True)
    read = {line.split()[1] for line in path.read_text().splitlines() if line.startswith(("cd ", ". "))}
    assert not read
    assert "launch/" not in path.read_text()


def test_a_rendered_environment_writes_deepspeeds_file(tmp_path):
    path = tmp_path / "environment.sh"
    assert _main(["environment", "--output", str(path)]) == 0
    bare = {"PATH": os.environ["PATH"]}
    written = [
        subprocess.run(["bash", str(file)], env=bare, capture_output=True, check=True).stdout
        for file in (path, LAUNCH / "environment.sh")
    ]
    assert b"NCCL_DEBUG=WARN" in written[0]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("base", "option"),
    [
        *(
            (SLURM, option)
            for option in ("--time=1:00:00", "--partition=p", "--cpus=3", "--account=a", "--qos=q", "--constraint=c")
        ),
        *((SLURM, option) for option in ("--array=0-3%1", "--sbatch=exclusive")),
        *((KUBERNETES, option) for option in ("--image=b", "--claim=b", "--mount=/b", "--restarts=9")),
        *(
            (base, option)
            for base in (SLURM, KUBERNETES)
            for option in ("--config=500b.json", "--run-dir=/b", "--name=b", "--grace=77", "training.seed=5")
        ),
    ],
)
def test_every_option_has_an_effect(base, option):
    assert _render([*base, option]) != _render(base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "--config", "tiny.json"], "cluster: missing"),
        ([*SLURM, "training.lr=fast"], "training.lr"),
        ([*SLURM, "--time", "a day"], "--time: given 'a day'"),
        ([*SLURM, "--name", "My Run"], "--name: given 'My Run'"),
        ([*KUBERNETES, "--grace", "10"], "--grace: given 10"),
        ([*KUBERNETES, "--restarts", "-1"], "--restarts: given -1"),
        ([*KUBERNETES, "--mount", "shared"], "--mount: given 'shared'"),
        ([*SLURM, "--grace", "-5"], "--grace: given -5"),
        ([*SLURM, "--time", "0:04:00"], "--grace: given 300"),
        ([*SLURM, "--time", "99:99:99"], "--time: given '99:99:99'"),
        ([*SLURM, "--cpus", "0"], "--cpus: given 0"),
        ([*SLURM, "--partition", "a b\nc"], "--partition: given"),
        ([*SLURM, "cluster.nodes=5"], "training.global_batch_size"),
    ],
)
def test_wrong_input_is_one_message(arguments, message):
    command = [sys.executable, str(ROOT / "tools" / "render_launch.py"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_output_goes_to_a_file(tmp_path):
    path = tmp_path / "job.sbatch"
    assert _main([*SLURM, "--output", str(path)]) == 0
    assert path.read_text() == _render(SLURM)


def _main(arguments: list[str]) -> int:
    return render_launch.run_tool(render_launch.parser(), render_launch.work, arguments)


def _program(name: str) -> Any:
    """A program of launch/ as a module."""
    return load_main(f"launch/{name}.py")


@pytest.fixture
def finished():
    """launch/finished.py."""
    return _program("finished")


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [([], "runs/1t"), (["parallel.ep_size=64"], "runs/1t-ep64"), (["--run-dir", "x", "parallel.ep_size=64"], "x")],
)
def test_preflight_looks_where_training_will_write(arguments, directory):
    preflight = _program("preflight")
    parsed = preflight.parse_arguments(["--config", "1t.json", *arguments])
    assert preflight.preflight_of(parsed).run_dir == Path(directory)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["parallel.ep_size=64", "training.seed=1"], "1t-ep64"),
        (["--proxy", "--world-size", "4", "parallel.pp_size=2"], "1t-proxy-x4-pp2"),
        (["--proxy"], "1t-proxy-x1"),
    ],
)
def test_finished_looks_where_training_wrote(finished, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    tag = tmp_path / "runs" / name / "checkpoints" / "step_00000012"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("{}")
    (tmp_path / "runs" / name / "manifest.json").write_text(json.dumps({"total_steps": 12}))
    assert finished.main(["--config", "1t.json", *arguments]) == 0
    assert finished.main(["--config", "1t.json", *arguments, "parallel.ep_size=16"]) == 75
    assert finished.main(["--config", "1t.json", *arguments, "parallel.zero_stage=9"]) == 2


def test_finished_tells_whether_a_run_has_its_length(finished, tmp_path):
    arguments = ["--config", "tiny.json", "--run-dir", str(tmp_path)]
    assert finished.main(arguments) == 75
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"total_steps": 12}))
    (tmp_path / "checkpoints" / "step_00000012").mkdir()
    assert finished.main(arguments) == 75, "a checkpoint without a manifest is none"
    for step, code in ((11, 75), (12, 0)):
        tag = tmp_path / "checkpoints" / f"step_{step:08d}"
        tag.mkdir(exist_ok=True)
        (tag / "manifest.json").write_text("{}")
        assert finished.main(arguments) == code
    for planned in ("--dry-run", "--print-config"):
        assert finished.main(["--config", "tiny.json", "--run-dir", str(tmp_path / "none"), planned]) == 0


FAKE_SLURM = {
    # One task, with the variables that srun sets; the options before the command are srun's.
    "srun": """while [[ "$1" == -* ]]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NNODES=1 SLURM_STEP_ID=0
echo $$ > "$FAKE/task"
exec "$@" """,
    "scancel": """echo "$@" >> "$FAKE/calls"; kill -TERM $(cat "$FAKE/task")""",
    "scontrol": """echo "$@" >> "$FAKE/calls" """,
}


@pytest.mark.slow
def test_a_slurm_job_that_is_told_to_go_saves_and_requeues_until_the_run_has_its_length(tmp_path):
    """With programs in SLURM's place that do what its manual says of them."""
    for name, script in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    one = ["training.global_batch_size=4", "training.max_steps=60", f"data.data_dir={tmp_path}"]
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "tiny.json", "--run-dir", str(run_dir)]
    command += [*SMALL, *small_data(tmp_path), *one]
    variables = {**environment(), "FAKE": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77"}
    variables |= {"SLURM_CPUS_PER_TASK": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    codes = [_start_and_signal(command, variables, run_dir, signal.SIGUSR1)]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--signal=TERM 77", "requeue 77"]
    codes.append(subprocess.run(command, env=variables, timeout=120, capture_output=True, check=False).returncode)
    assert codes == [75, 0]
    assert (tmp_path / "calls").read_text().splitlines() == calls
    starts = [json.loads(line)["step"] for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert 0 < starts[1] < 60


@pytest.mark.slow
def test_torchrun_that_is_told_to_go_ends_with_75_and_then_with_0(tmp_path):
    run_dir = tmp_path / "run"
    command = [str(LAUNCH / "torchrun.sh"), "--config", "tiny.json", "--run-dir", str(run_dir), *SMALL]
    command += [*small_data(tmp_path), "training.max_steps=40", f"data.data_dir={tmp_path}"]
    variables = {**environment(), "NPROC": "2", "NODE_RANK": "0", "PYTHON": sys.executable}
    variables |= {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    assert _start_and_signal(command, variables, run_dir, signal.SIGTERM) == 75
    done = subprocess.run(command, env=variables, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(line["step"] for line in metrics(run_dir)) == 40
    wrong = subprocess.run([*command, "training.lr=fast"], env=variables, timeout=60, capture_output=True, check=False)
    assert wrong.returncode == 2


def _start_and_signal(command: list[str], variables: dict[str, str], run_dir: Path, number: int) -> int:
    """The exit code of a run that gets a signal after its second step."""
    process = subprocess.Popen(command, env=variables, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while max((line["step"] for line in metrics(run_dir)), default=0) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_mpirun_starts_the_ranks(tmp_path):
    command = [str(LAUNCH / "mpirun.sh"), "--config", "tiny.json", "--json", "--run-dir", str(tmp_path / "run")]
    variables = {**environment(), "NPROC": "2", "PYTHON": sys.executable, "PROGRAM": "launch/preflight.py"}
    variables |= {"MASTER_PORT": str(free_port()), "MPIRUN_FLAGS": "--oversubscribe"}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command += [*SMALL, *small_data(tmp_path)]
    done = subprocess.run(command, env=variables, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["processes"] == 2
