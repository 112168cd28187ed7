"""What is tried with damaged input.

A target damages its input in a case's folder, and then reads it by a main or by the function behind one; the result is
compared with that of the whole input.
"""

import contextlib
import io
import json
import pickle
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mythos_ds.cluster.hostfile import read_hostfile
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.data.datasets import build_datasets, prepare_index_cache
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.mains import run_tool
from mythos_ds.train.resume import names_of
from mythos_ds.train.run_changes import continue_manifest
from mythos_ds.train.run_directory import RunDirectory
from tests.fuzz import artefacts, mutators
from tests.fuzz.mutators import Mutation
from tests.helpers.mains import load_main

DEEPSPEED = {
    "wall_clock_breakdown": False, "steps_per_print": 10, "gradient_predivide_factor": 1.0, "log_level": "info",
    "communication_data_type": "fp32", "csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True},
    "comet": {"enabled": False, "project": "x"}, "wandb": {"enabled": False, "group": "x"},
    "comms_logger": {"enabled": False, "prof_ops": ["x"]}, "timers": {"throughput": {"enabled": True}},
    "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000, "sub_group_size": 1000,
                          "stage3_max_live_parameters": 1000, "reduce_scatter": True},
}  # fmt: skip


MOST_BY_BYTES = 2


@dataclass
class Case:
    """One attempt. `root`: a folder of its own with copies of the artefacts; what is written goes below `root`/out.
    `canary`: a file that code hidden in the input would make."""

    root: Path
    generator: random.Random
    canary: Path
    whole: bool = False
    """Without damage: what the others are compared with."""
    names: list[str | None] = field(default_factory=list)
    """Any of these in a message tells where the fault is."""

    def damage(self, *files: str) -> Mutation:
        """Damage one of the files."""
        if self.whole:
            return Mutation("none")
        path = self.root / self.generator.choice(files)
        self.names += [path.name, path.stem]
        return mutators.mutate_file(path, self.generator, str(self.canary))


class Ended(Exception):
    """A main's exit code that is not 0, and what it said."""

    def __init__(self, code: int, said: str):
        super().__init__(said)
        self.code = code


@dataclass(frozen=True)
class Target:
    """What is damaged and read. run: damages, reads, and returns (what was done, the result). same: whether a result of
    damaged input is right, beside that of the whole."""

    needs: tuple[str, ...]
    run: Callable[[Case], tuple[Mutation, Any]]
    same: Callable[[Any, Any, Mutation], bool]


@cache
def _main(path: str) -> Any:
    return load_main(path)


def call(path: str, *arguments: str) -> str:
    """What a main prints. Raises Ended where it does not end with 0."""
    module, out, err = _main(path), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main = getattr(module, "main", None)
            code = main(list(arguments)) if main else run_tool(module.parser(), module.work, list(arguments))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    if code:
        raise Ended(code, err.getvalue() + out.getvalue())
    return out.getvalue()


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of everything in JSON values but what is empty."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{at}.{key}")
    else:
        yield at, json.dumps(value)


def equal(whole: Any, found: Any, mutation: Mutation) -> bool:
    """The same."""
    return bool(whole == found)


def only_the_key(whole: Any, found: Any, mutation: Mutation) -> bool:
    """The same but for what lies at the key that was damaged; bytes change one value, or the name of one."""
    differing = dict(set(leaves(whole)) ^ set(leaves(found)))
    if mutation.key is None:
        return len(differing) <= MOST_BY_BYTES
    return all(mutation.key in path.split(".") for path in differing)


def anything(whole: Any, found: Any, mutation: Mutation) -> bool:
    """Whatever came out: input of another meaning that no digest covers."""
    return True


def _digest(*arrays: Any) -> str:
    return sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def config(case: Case) -> tuple[Mutation, Any]:
    """A run's file."""
    mutation = case.damage("run.json")
    case.names += [mutation.key]
    return mutation, _printed(case, str(case.root / "run.json"))


def deepspeed(case: Case) -> tuple[Mutation, Any]:
    """The `deepspeed` section of a run's file."""
    path, mutation = case.root / "run.json", Mutation("none")
    content = json.loads(path.read_text())
    section = json.dumps(DEEPSPEED).encode()
    if not case.whole:
        section, mutation = mutators.mutated_json(DEEPSPEED, case.generator, str(case.canary))
        case.names += [mutation.key, "run.json"]
    text = json.dumps({**content, "deepspeed": "@HERE@"}).encode()
    path.write_bytes(text.replace(b'"@HERE@"', section))
    return mutation, _printed(case, str(path))


def override(case: Case) -> tuple[Mutation, Any]:
    """Settings on the command line."""
    content = json.loads((case.root / "run.json").read_text())
    keys = [f"{section}.{key}" for section, inside in content.items() if isinstance(inside, dict) for key in inside]
    keys += ["deepspeed.zero_optimization.reduce_bucket_size", "cluster.nodes", "no.such", "parallel.pp_size"]
    if case.whole:
        return Mutation("none"), _printed(case, str(case.root / "run.json"))
    key = case.generator.choice(keys)
    value = mutators.any_value(case.generator, str(case.canary))
    text = value if isinstance(value, str) else json.dumps(value)
    case.names += ["override", key, key.rpartition(".")[2]]
    mutation = Mutation("override", key.rpartition(".")[2])
    return mutation, _printed(case, str(case.root / "run.json"), f"{key}={text}")


def _printed(case: Case, *words: str) -> Any:
    if case.generator.random() < 0.3:
        call("launch/pretrain.py", "--config", *words, "--dry-run")
    made = json.loads(call("launch/pretrain.py", "--config", *words, "--print-config"))
    made.pop("_derived")
    return made


def start(case: Case) -> tuple[Mutation, Any]:
    """The configuration of the weights that a run starts from."""
    mutation = case.damage("model/config.json")
    case.names += [mutation.key, "init_from", "model"]
    words = [str(case.root / "run.json"), f"training.init_from={case.root / 'model'}"]
    found = json.loads(call("launch/pretrain.py", "--config", *words, "--print-config"))
    return mutation, found["model"]


def manifest(case: Case) -> tuple[Mutation, Any]:
    """What a run is, fixed at its first start."""
    mutation = case.damage("run/manifest.json")
    case.names += [mutation.key]
    case.names += ["when the run was started"]  # after the key and both values
    resolved = resolve(load_config("tiny", artefacts.run_config(case.root)).config, 1)
    stored = RunDirectory(case.root / "run").read_manifest()
    continued = continue_manifest(stored, ResolvedStage(None, resolved), 0, names_of(None, "tiny.json", []))
    return mutation, {"phases": [phase.start_step for phase in continued.phases], "total": continued.total_steps}


def checkpoint(case: Case) -> tuple[Mutation, Any]:
    """A checkpoint that is merged, damaged as it lies or by someone who mends its manifest."""
    tag = next((case.root / "checkpoints").iterdir())
    files = [str(path.relative_to(case.root)) for path in sorted(tag.rglob("*")) if path.is_file()]
    mutation, signed = Mutation("none"), False
    if not case.whole:
        signed = case.generator.random() < 0.5
        states = [name for name in files if name.endswith(".pt")]
        if signed and case.generator.random() < 0.3:
            name = case.generator.choice(states)
            _plant(case.root / name, case.canary)
            case.names += [Path(name).name]
            mutation = Mutation("pickle")
        else:
            mutation = case.damage(*(name for name in files if not (signed and name.endswith("manifest.json"))))
        case.names += [tag.name, mutation.key]
        if signed:
            with contextlib.suppress(OSError):
                artefacts.sign(tag)
    call("tools/merge_checkpoint.py", str(tag), "--output", str(case.root / "out" / "merged"))
    found = (case.root / "out" / "merged" / "model.safetensors").read_bytes()
    bits = signed and not mutation.what.startswith("json")
    return Mutation("signed bytes" if bits else mutation.what, mutation.key), sha256(found).hexdigest()


def _plant(path: Path, canary: Path) -> None:
    """A file of torch's that runs code when it is unpickled as pickle does."""
    torch.save({"x": _Touch(str(canary))}, path)


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def signed_or_equal(whole: Any, found: Any, mutation: Mutation) -> bool:
    """The same; what was damaged by someone who mended the manifest may be other numbers."""
    return mutation.what == "signed bytes" or bool(whole == found)


def model(case: Case) -> tuple[Mutation, Any]:
    """A model folder that text is generated with."""
    mutation = case.damage("model/config.json")
    case.names += [mutation.key, "model"]
    return mutation, call(
        "tools/generate.py", artefacts.TEXT, "--model", str(case.root / "model"), "--tokens", "4", "--temperature", "0"
    )


def weights(case: Case) -> tuple[Mutation, Any]:
    """The header of a safetensors file."""
    path, mutation = case.root / "model" / "model.safetensors", Mutation("none")
    case.names += [path.name, "model"]
    if not case.whole and case.generator.random() < 0.15:
        mutation = mutators.misplace(path, case.generator)
    elif not case.whole:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        if case.generator.random() < 0.5:
            header, mutation = mutators.mutated_json(json.loads(content[8:end]), case.generator, str(case.canary))
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        else:
            header, mutation = mutators.mutated_bytes(content[:end], case.generator)
            path.write_bytes(header + content[end:])
    return mutation, call(
        "tools/generate.py", artefacts.TEXT, "--model", str(case.root / "model"), "--tokens", "4", "--temperature", "0"
    )


def index(case: Case) -> tuple[Mutation, Any]:
    """The prepared order of a run's samples, of text or of conversations, on shared storage."""
    folder = case.generator.choice(sorted((case.root / "data" / "index").iterdir()))
    files = [str(path.relative_to(case.root)) for path in sorted(folder.rglob("*")) if path.is_file()]
    mutation = Mutation("none")
    if not case.whole and case.generator.random() < 0.25:
        name = case.generator.choice([name for name in files if name.endswith(".npy")])
        with (case.root / name).open("wb") as file:
            np.lib.format.write_array(file, np.array([_Touch(str(case.canary))], dtype=object), allow_pickle=True)
        if case.generator.random() < 0.3:
            (case.root / name).write_bytes(pickle.dumps(_Touch(str(case.canary))))
        mutation = Mutation("pickle")
        case.names += [Path(name).name]
    else:
        mutation = case.damage(*files)
    case.names += [folder.name]
    return mutation, _samples(case)


def tokens(case: Case) -> tuple[Mutation, Any]:
    """The token files of a dataset, before an index is made."""
    mutation = case.damage("data/train.bin", "data/train.idx", "data/train.json")
    case.names += ["train", mutation.key]
    for path in (case.root / "data" / "index").iterdir():
        path.rename(case.root / "out" / path.name)
    return mutation, _samples(case, "train")


def conversations(case: Case) -> tuple[Mutation, Any]:
    """The files of conversations, before an index is made."""
    mutation = case.damage(*(f"data/chats.{ending}" for ending in ("bin", "idx", "mask", "json")))
    case.names += ["chats", mutation.key]
    for path in (case.root / "data" / "index").iterdir():
        path.rename(case.root / "out" / path.name)
    return mutation, _samples(case, "chats")


def _samples(case: Case, *names: str) -> Any:
    made = []
    for name in names or ("train", "chats"):
        data = load_config("tiny", artefacts.run_config(case.root, name)).config.data
        prepare_index_cache(data, **artefacts.index_arguments(case.root))
        found = build_datasets(data, **artefacts.index_arguments(case.root))
        for part in (found.train, found.valid):
            made += [_digest(*part[number].values()) for number in range(len(part))]
    return made


def tokenizer(case: Case) -> tuple[Mutation, Any]:
    """A sentencepiece model."""
    mutation = case.damage("data/tokenizer.model")
    return mutation, Tokenizer.load(case.root / "data" / "tokenizer.model").encode(artefacts.TEXT)


def prepare(case: Case) -> tuple[Mutation, Any]:
    """JSON lines that become a dataset: every line that is right is in it, or nothing is published."""
    path = case.root / "input.jsonl"
    mutation = case.damage("input.jsonl")
    case.names += ["line"]
    words = ["--tokenizer", str(case.root / "data" / "tokenizer.model"), "--output", str(case.root / "out" / "made")]
    call("tools/prepare_data.py", str(path), *words, "--workers", "1", "--keep-order")
    made = json.loads((case.root / "out" / "made.json").read_text())
    rows = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip("\r\n\t ")]
    texts = [json.loads(line)["text"] for line in rows]
    assert made["documents"] == sum(text != "" for text in texts), (made["documents"], len(texts))
    return mutation, made["documents"]


def hostfile(case: Case) -> tuple[Mutation, Any]:
    """Hosts and their processes; a name that changed is another host."""
    mutation = case.damage("hostfile")
    lines = read_hostfile(case.root / "hostfile")
    text = (case.root / "hostfile").read_text(encoding="utf-8-sig")
    assert all(line.host in text and line.slots > 0 for line in lines)
    return mutation, [(line.host, line.slots) for line in lines]


def _job_words(case: Case) -> tuple[list[str], list[str]]:
    """Overrides and options with values that a shell or YAML might take for its own."""
    generator, canary = case.generator, str(case.canary)
    values = [mutators.any_text(generator, canary) for _ in range(3)]
    overrides = [f"training.init_from={values[0]}", f"data.data_dir={values[1]}"]
    cluster = dict(artefacts.CLUSTER)
    if generator.random() < 0.5:
        cluster[generator.choice(list(cluster))] = mutators.any_value(generator, canary)
    overrides += artefacts.cluster(cluster)
    case.names += ["training", "data", "cluster", "override", "--", *(value for value in values if len(value) > 2)]
    return overrides, values


def slurm(case: Case) -> tuple[Mutation, Any]:
    """A batch script: what training gets is what was given, and nothing else runs."""
    out = case.root / "out" / "job.sbatch"
    overrides, options = artefacts.cluster(), []
    if not case.whole:
        overrides, values = _job_words(case)
        names = ["--partition", "--time", "--name", "--run-dir", "--account", "--qos", "--constraint", "--array"]
        known = call("tools/render_launch.py", "slurm", "--help")
        name = case.generator.choice([name for name in names if name in known])
        options = [f"{name}={values[2]}"]
        if "--sbatch" in known and case.generator.random() < 0.6:
            key = case.generator.choice(["mail-user", "comment", "exclude", "job-name", values[1]])
            options.append(f"--sbatch={key}={values[2]}")
    words = ["slurm", "--config", str(case.root / "run.json"), "--output", str(out), *options, "--", *overrides]
    call("tools/render_launch.py", *words)
    text = out.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in text.splitlines()[: text[: text.rindex("#SBATCH")].count("\n") + 1])
    ran = _dry_batch(case, out)
    given = ran[ran.index("pretrain") + 1 :]
    assert given[:2] == ["--config", str(case.root / "run.json")], given
    assert given[-len(overrides) :] == overrides, given
    return Mutation("words"), len(head) > 5


def _dry_batch(case: Case, script: Path) -> list[str]:
    """The arguments that srun gets from a batch script, with programs in Slurm's place."""
    programs = case.root / "programs"
    programs.mkdir()
    for name, body in {"srun": 'printf "%s\\0" "$@"', "scontrol": "true", "scancel": "true", "python": "true"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(case.root / "out"), "SLURM_JOB_ID": "7",
                 "SLURM_CPUS_PER_TASK": "1", "HOME": str(case.root)}  # fmt: skip
    done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, timeout=5, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().removesuffix("\0").split("\0")


def kubernetes(case: Case) -> tuple[Mutation, Any]:
    """A Job: YAML that holds what was given, as texts and numbers."""
    out = case.root / "out" / "job.yaml"
    overrides, options = artefacts.cluster(), ["--image=registry/it:1", "--claim=disk"]
    if not case.whole:
        overrides, values = _job_words(case)
        name = case.generator.choice(["--image", "--claim", "--mount", "--name", "--run-dir"])
        options.append(f"{name}={values[2]}")
    words = ["kubernetes", "--config", str(case.root / "run.json"), "--output", str(out), *options, "--", *overrides]
    call("tools/render_launch.py", *words)
    parts = list(yaml.safe_load_all(out.read_text(encoding="utf-8")))
    assert [part["kind"] for part in parts] == ["Service", "Job"]
    (container,) = parts[1]["spec"]["template"]["spec"]["containers"]
    expanded = [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes takes "$$(x)" for "$(x)"
    assert expanded[-len(overrides) :] == overrides, expanded
    return Mutation("words"), sorted(container)


TARGETS: dict[str, Target] = {
    "config": Target(("run.json",), config, only_the_key),
    "deepspeed": Target(("run.json",), deepspeed, only_the_key),
    "override": Target(("run.json",), override, only_the_key),
    "start": Target(("run.json", "model"), start, only_the_key),
    "manifest": Target(("run",), manifest, equal),
    "checkpoint": Target(("checkpoints",), checkpoint, signed_or_equal),
    "model": Target(("model",), model, anything),
    "weights": Target(("model",), weights, equal),
    "index": Target(("data",), index, equal),
    "tokens": Target(("data",), tokens, equal),
    "conversations": Target(("data",), conversations, equal),
    "tokenizer": Target(("data",), tokenizer, anything),
    "prepare": Target(("data", "input.jsonl"), prepare, anything),
    "hostfile": Target(("hostfile",), hostfile, anything),
    "slurm": Target(("run.json",), slurm, equal),
    "kubernetes": Target(("run.json",), kubernetes, equal),
}
