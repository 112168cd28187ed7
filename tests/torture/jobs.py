"""What is tortured: jobs of the tools, with small inputs that are made once, and what each writes when left alone."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import resolve
from mythos_ds.mains import run_tool
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_checkpoint import write_synthetic
from tests.helpers.text_data import make_texts

TINY = ROOT / "models" / "tiny"
OUTPUT = "out"
"""Name of every job's output, in a place of its own."""
_TOOLS = {
    "merge": load_main("tools/merge_checkpoint.py"),
    "convert": load_main("tools/convert_checkpoint.py"),
    "reshard": load_main("tools/reshard_checkpoint.py"),
    "average": load_main("tools/average_checkpoints.py"),
    "prepare": load_main("tools/prepare_data.py"),
}
verify = load_main("tools/verify_checkpoint.py").verify


@dataclass(frozen=True)
class Job:
    """A command without its output."""

    name: str
    kind: str
    arguments: tuple[str, ...]

    def run(self, place: Path) -> int:
        """The exit code of the command, in this process."""
        tool, line = _TOOLS[self.kind], [*self.arguments, "--output", str(place / OUTPUT)]
        return int(tool.main(line) if hasattr(tool, "main") else run_tool(tool.parser(), tool.work, line))


def make_jobs(folder: Path) -> dict[str, Job]:
    """The jobs by name; their inputs are made in `folder`."""
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    run = _training_run(folder / "run")
    other = _other_model(folder / "other")
    texts = [_texts(folder / f"{name}.jsonl", seed) for seed, name in enumerate(("a", "b"))]
    pieces = ("--max-file-bytes", "400000")
    tokenizer = str(TINY / "tokenizer.model")
    from_tiny = ("--from", "mythos", "--input", str(TINY), "--to")
    jobs = [
        Job("merge fp32", "merge", (run, "--tokenizer", tokenizer, *pieces)),
        Job("merge bf16", "merge", (run, "--tokenizer", tokenizer, *pieces, "--dtype", "bfloat16")),
        Job("merge in workers", "merge", (run, "--tokenizer", tokenizer, *pieces, "--jobs", "2")),
        Job("merge one file", "merge", (run, "--tokenizer", tokenizer)),
        Job("convert hf", "convert", (*from_tiny, "hf", *pieces, "--with-remote-code")),
        Job("convert fp8", "convert", (*from_tiny, "hf", "--dtype", "fp8")),
        Job("convert hf fp32", "convert", (*from_tiny, "hf", *pieces, "--dtype", "float32")),
        Job("reshard", "reshard", (run, *pieces)),
        Job("reshard large", "reshard", (run, "--max-file-bytes", "3000000")),
        Job("average", "average", (str(TINY), other, "--force", *pieces)),
        Job("average weighted", "average", (str(TINY), other, "--force", "--weights", "1", "3", *pieces)),
        *(
            Job(f"prepare {name}", "prepare", (file, "--tokenizer", tokenizer, "--workers", "1"))
            for name, file in zip(("a", "b"), texts, strict=True)
        ),
    ]
    return {job.name: job for job in jobs}


def _training_run(folder: Path) -> str:
    """A run's directory with a checkpoint of two ranks, Adam's moments in it."""
    resolved = resolve(load_config("tiny", ["parallel.ep_size=2", "training.micro_batch_size=1"]).config, 2)
    write_synthetic(resolved, folder / "checkpoints", moments=True)
    (folder / "manifest.json").write_text('{"mine": 1}')
    return str(folder)


def _other_model(folder: Path) -> str:
    shutil.copytree(TINY, folder)
    (folder / "checksums.json").unlink(missing_ok=True)
    tensors = load_file(TINY / "model.safetensors")
    save_file({name: value * 1.25 for name, value in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def _texts(file: Path, seed: int) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1500, seed=seed)))
    return str(file)


def tree(place: Path) -> dict[str, str]:
    """Everything below a place: the digest of each file, hidden ones too, and what is none."""
    found = {}
    for path in sorted(place.rglob("*")):
        whole = path.is_file() and not path.is_symlink()
        found[path.relative_to(place).as_posix()] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if whole else "folder" if path.is_dir() else "other"
        )
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What is wrong with a place, in words."""
    extra = [f"left behind: {name}" for name in sorted(set(found) - set(expected))]
    missing = [f"missing: {name}" for name in sorted(set(expected) - set(found))]
    other = [name for name in sorted(set(found) & set(expected)) if found[name] != expected[name]]
    return extra + missing + [f"other content: {name}" for name in other]


def published_faults(job: Job, place: Path) -> list[str]:
    """What is wrong with an output that looks complete; none where it does not."""
    output = place / OUTPUT
    if job.kind == "prepare":
        sidecar = output.with_suffix(".json")
        sizes = {"bin": "bin_bytes", "idx": "idx_bytes"}
        content = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        return [
            end
            for end, key in sizes.items()
            if content and output.with_suffix(f".{end}").stat().st_size != content[key]
        ]
    complete: Sequence[Path] = [output] if (output / "config.json").is_file() else []
    if job.kind == "reshard":
        complete = list((output / "checkpoints").glob("step_*"))
    return [fault for path in complete for faults in verify(path).values() for fault in faults]
