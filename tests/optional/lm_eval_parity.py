"""lm-eval on an exported model and on a server of it: the same likelihoods and the same texts, on tasks of this folder.

vllm_request_loops.py calls this while its server runs; lm-eval has an environment of its own.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("lm_eval_tasks")
CHOICES, TEXTS = "python_line", "python_rest"
TOLERANCE = 1e-4
"""In log-likelihood."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def samples(python: str, model: str, arguments: dict[str, Any], *extra: str) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval notes of each document, by task; extra: more of its command line. Raises CalledProcessError where it
    fails, with its words above."""
    with tempfile.TemporaryDirectory() as output:
        given = ",".join(f"{name}={value}" for name, value in arguments.items())
        command = [
            python, "-m", "lm_eval", "run", "--model", model, "--model_args", given, "--tasks", f"{CHOICES},{TEXTS}",
            "--include_path", str(TASKS), "--output_path", output, "--log_samples", "--batch_size", "1", *extra,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=TASKS, env={**os.environ, **_OFFLINE}, timeout=600, capture_output=True)
        if done.returncode:
            os.write(2, done.stderr[-4000:])
        done.check_returncode()
        found = {}
        for task in (CHOICES, TEXTS):
            (file,) = Path(output).rglob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[task] = sorted(rows, key=lambda row: row["doc_id"])
        return found


def likelihoods(rows: list[dict[str, Any]]) -> list[float]:
    """The log-likelihood of each end of each document."""
    return [float(answer[0]) for row in rows for answer in row["filtered_resps"]]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    """The text generated for each document."""
    return [text for row in rows for text in row["filtered_resps"]]


def compare(python: str, folder: str, url: str) -> tuple[bool, str]:
    """Run both of lm-eval's models, `hf` on a folder that carries its code and `local-completions` on the address of a
    server's API, with its loops and, in generation, with two; whether they agree, and in what."""
    folder, python = str(Path(folder).absolute()), str(Path(python).absolute())  # lm-eval runs where the tasks are
    local = {"pretrained": folder, "trust_remote_code": True, "dtype": "float32"}
    remote = {
        "model": "mythos", "base_url": f"{url}/completions", "tokenizer": folder, "tokenized_requests": True,
        "trust_remote_code": True, "num_concurrent": 1,
    }  # fmt: skip
    own, theirs = samples(python, "hf", local), samples(python, "local-completions", remote)
    fewer = samples(python, "hf", {**local, "n_loops": 2})
    asked = samples(python, "local-completions", remote, "--gen_kwargs", '{"vllm_xargs": {"n_loops": 2}}')
    first, second = likelihoods(own[CHOICES]), likelihoods(theirs[CHOICES])
    apart = max(abs(one - other) for one, other in zip(first, second, strict=True))
    pairs = list(zip(texts(own[TEXTS]), texts(theirs[TEXTS]), strict=True))
    pairs += zip(texts(fewer[TEXTS]), texts(asked[TEXTS]), strict=True)
    same = sum(one == other for one, other in pairs)
    words = f"{len(first)} log-likelihoods within {apart:.1e}, {same} of {len(pairs)} texts equal, half at 2 loops"
    documents = len((TASKS / "python_lines.jsonl").read_text(encoding="utf-8").splitlines())
    whole = len(first) > documents and len(pairs) == 2 * documents and texts(own[TEXTS]) != texts(fewer[TEXTS])
    return whole and apart <= TOLERANCE and same == len(pairs), words
