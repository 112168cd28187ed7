"""vLLM against transformers, in an environment that has vLLM: the same greedy tokens, an OpenAI server, and
no model with a hole.

    make vllm-parity

makes that environment, exports models/tiny and small random models, one of them with a chat template, and runs this
script on their folders.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT_LENGTHS = (5, 12, 20, 9)
NEW_TOKENS = 32
SERVER_SECONDS = 300
MESSAGES = [
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How warm?"},
]
ANSWER_TOKENS = 6
"""Of the likeliest answer to MESSAGES of the model that export_for_vllm.py makes for them."""
CHAT_LENGTH = 256
_QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def say(line: str) -> None:
    """A line of the result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare(folder: str, n_loops: int | None) -> bool:
    """Greedy tokens of both engines for each prompt; printed, and whether all are equal."""
    import torch
    from vllm import LLM, SamplingParams

    import mythos_hf

    overrides = {} if n_loops is None else {"hf_overrides": {"n_loops": n_loops}}
    sizes = {"max_model_len": 64, "max_num_seqs": 8}
    engine = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **sizes, **overrides)
    config = engine.llm_engine.model_config.hf_config
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    model = mythos_hf.MythosForCausalLM.from_pretrained(folder).eval()
    equal = []
    for prompt, result in zip(prompts, results, strict=True):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "n_loops": config.n_loops}
        expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        equal.append(list(result.outputs[0].token_ids) == expected)
    name = f"{Path(folder).name}, {config.n_loops} loops"
    say(f"PARITY {name}: {sum(equal)} of {len(equal)} prompts x {NEW_TOKENS} tokens")
    return all(equal)


def refuses_missing_expert(folder: str) -> bool:
    """Whether a folder that lacks one expert's matrix is refused rather than served with what memory holds."""
    from safetensors.torch import load_file, save_file
    from vllm import LLM

    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(folder, name, dirs_exist_ok=True)
        weights = Path(name) / "model.safetensors"
        tensors = load_file(weights)
        del tensors[next(key for key in tensors if ".mlp.experts.1.down_proj" in key)]
        save_file(tensors, weights, {"format": "pt"})
        try:
            LLM(name, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
        except Exception as error:
            say(f"MISSING EXPERT: {str(error).splitlines()[0][:120]}")
            return "experts.1.down_proj" in str(error)
    say("MISSING EXPERT: loaded")
    return False


@contextmanager
def served(folder: str, length: int) -> Iterator[Any]:
    """A client of `vllm serve` on the loopback interface; None where the server does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", folder, "--served-model-name", "mythos",
        "--dtype", "float32",
        "--max-model-len", str(length), "--max-num-seqs", "4", "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not _healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                say(f"SERVE {Path(folder).name}: the server did not come up")
                yield None
                return
            time.sleep(1)
        from openai import OpenAI

        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def serve(folder: str) -> bool:
    """`vllm serve` answers a completion as transformers does."""
    from transformers import AutoTokenizer

    with served(folder, 64) as client:
        if client is None:
            return False
        answer = client.completions.create(model="mythos", prompt="def main(", max_tokens=16, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def main(", return_tensors="pt", add_special_tokens=False).input_ids
    expected = tokenizer.decode(_likeliest(folder, tokens, 16), skip_special_tokens=True)
    say(f"SERVE: {json.dumps(answer.choices[0].text)}")
    return answer.choices[0].text == expected


def chat(folder: str) -> bool:
    """`vllm serve` answers /v1/chat/completions in the template of the folder as transformers does, and stops at the
    end of the turn, which generation_config.json names beside the end of text."""
    from transformers import AutoTokenizer

    with served(folder, CHAT_LENGTH) as client:
        if client is None:
            return False
        answer = client.chat.completions.create(model="mythos", messages=MESSAGES, max_tokens=32, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
    tokens: Any = tokenizer.apply_chat_template(MESSAGES, **options)
    made = _likeliest(folder, tokens, 32)
    choice, expected = answer.choices[0], tokenizer.decode(made, skip_special_tokens=True)
    say(f"CHAT: {json.dumps(choice.message.content)}, ended by {choice.finish_reason} after {len(made)} tokens")
    equal = choice.message.content == expected and answer.usage.prompt_tokens == tokens.shape[1]
    return equal and choice.finish_reason == "stop" and len(made) == ANSWER_TOKENS + 1


def _likeliest(folder: str, tokens: Any, count: int) -> Any:
    """Up to `count` greedy tokens of transformers after `tokens`, the one that ends them included."""
    import mythos_hf

    model = mythos_hf.MythosForCausalLM.from_pretrained(folder).eval()
    return model.generate(tokens, max_new_tokens=count, do_sample=False)[0, tokens.shape[1] :]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def main() -> int:
    """Each comparison in a process of its own: vLLM starts once per process."""
    os.environ.update(_QUIET)
    if len(sys.argv) > 2 and sys.argv[1] == "--missing":
        return 0 if refuses_missing_expert(sys.argv[2]) else 1
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        loops = int(sys.argv[3]) if len(sys.argv) > 3 else None
        return 0 if compare(sys.argv[2], loops) else 1
    folders = sys.argv[1:]
    runs = [["--one", folder] for folder in folders] + [["--one", folders[0], "7"], ["--missing", folders[0]]]
    codes = [subprocess.run([sys.executable, __file__, *run], timeout=900).returncode for run in runs]
    answers = [serve(folders[0]), *(chat(each) for each in folders if (Path(each) / "chat_template.jinja").is_file())]
    equal = not any(codes) and all(answers)
    say(f"vLLM parity: {'equal' if equal else 'DIFFERENT'}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
