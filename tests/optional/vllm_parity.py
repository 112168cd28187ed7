"""vLLM against transformers, in an environment that has vLLM: the same greedy tokens on one rank and on several, an
OpenAI server, and no model with a hole.

    make vllm-parity

makes that environment, exports models/tiny and small random models, and runs this module on the folder that holds
theirs. Each row is a process of its own, since vLLM starts once per process, and prints when it began, how long it took
and what came out; with a row's name after the folder it runs that row.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.optional.vllm_ranks import refuse_on_every_rank, slices_of_fp8_blocks
from tests.optional.vllm_scratch import dequantised_folder, release, segments

PROMPT_LENGTHS = (5, 12, 20, 9)
NEW_TOKENS = 32
SERVER_SECONDS = 300
ROW_SECONDS = 900
MARK = "ROW "
MESSAGES = [
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How warm?"},
]
ANSWER_TOKENS = 6
"""Of the likeliest answer to MESSAGES of the model that export_for_vllm.py makes for them."""
CHAT_LENGTH = 256
LOG_PROBABILITY_BAR = 1e-4
LATENT_WIDTH = 512 + 64
DEQUANTISE = {"quantization_config": {"quant_method": "fp8", "dequantize": True}}
_QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """A part of the row's result; vLLM's own lines are not."""
    _write(MARK + line)


@dataclass(frozen=True)
class Greedy:
    """A comparison of greedy tokens: of which folder, at which depth, on how many ranks, whether experts are whole,
    whether fp8 is dequantised, and whether the cache must be one of latents."""

    folder: str
    n_loops: int | None = None
    ranks: int = 1
    whole_experts: bool = False
    dequantised: bool = False
    latents: bool = False

    def __call__(self, root: Path) -> bool:
        """Compare both engines on each prompt."""
        return compare(root / self.folder, self)


def compare(folder: Path, row: Greedy) -> bool:
    """Greedy tokens and their log-probabilities of both engines for each prompt; printed, and whether they agree."""
    import torch
    from vllm import LLM, SamplingParams

    import mythos_hf

    cores = sorted(os.sched_getaffinity(0))
    if row.ranks > 1:  # vLLM would look for a NUMA node per rank
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(row.ranks))
    overrides = ({} if row.n_loops is None else {"n_loops": row.n_loops}) | (DEQUANTISE if row.dequantised else {})
    sizes = {"max_model_len": 64, "max_num_seqs": 8, "tensor_parallel_size": row.ranks}
    options = {"enforce_eager": True, "skip_tokenizer_init": True, "enable_expert_parallel": row.whole_experts}
    engine = LLM(str(folder), dtype="float32", hf_overrides=overrides, **sizes, **options)
    config = engine.llm_engine.model_config.hf_config
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=1)
    results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    with tempfile.TemporaryDirectory() as name:
        source = dequantised_folder(folder, Path(name)) if row.dequantised else folder
        model = mythos_hf.MythosForCausalLM.from_pretrained(source).eval()
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "n_loops": config.n_loops}
    asked |= {"return_dict_in_generate": True, "output_logits": True}
    equal, apart = [], 0.0
    for prompt, result in zip(prompts, results, strict=True):
        expected = model.generate(torch.tensor([prompt]), **asked)
        tokens, own = expected.sequences[0, len(prompt) :].tolist(), result.outputs[0]
        equal.append(list(own.token_ids) == tokens)
        for token, said, logits in zip(own.token_ids, own.logprobs, expected.logits, strict=True):
            apart = max(apart, abs(said[token].logprob - float(logits[0].log_softmax(-1)[token])))
    say(f"{sum(equal)} of {len(equal)} prompts x {NEW_TOKENS} tokens, log-probabilities within {apart:.1e}")
    good = all(equal) and apart < LOG_PROBABILITY_BAR and (not row.latents or caches_latents(engine, row.ranks))
    left = segments()
    engine.llm_engine.engine_core.shutdown()
    release(left)
    return good


def caches_latents(engine: Any, ranks: int) -> bool:
    """Whether a token takes one latent per (loop, layer) of the cache and no more, and the loops share what attention
    makes of their matrix."""
    config, cache = engine.llm_engine.model_config.hf_config, engine.llm_engine.vllm_config.cache_config
    token = config.num_hidden_layers * LATENT_WIDTH * 4
    blocks = int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30 // (cache.block_size * token)
    say(f"{cache.num_gpu_blocks} blocks of {cache.block_size} tokens in 1 GiB; {blocks} at {token} bytes a token")
    shared = ranks > 1 or engine.apply_model(shares_absorbed_matrices) == [True]
    return abs(cache.num_gpu_blocks - blocks) <= 1 and shared


def shares_absorbed_matrices(model: Any) -> bool:
    """Whether the loops of each layer have one pair of absorbed matrices."""
    layers = [layer.self_attn.attn for layer in model.model.recurrent.layers]
    return all(attn.W_UV is loops[0].W_UV and attn.W_UK_T is loops[0].W_UK_T for loops in layers for attn in loops)


def refuses_missing_expert(root: Path) -> bool:
    """Whether a folder that lacks one expert's matrix is refused rather than served with what memory holds."""
    from safetensors.torch import load_file, save_file
    from vllm import LLM

    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(root / "tiny", name, dirs_exist_ok=True)
        weights = Path(name) / "model.safetensors"
        tensors = load_file(weights)
        del tensors[next(key for key in tensors if ".mlp.experts.1.down_proj" in key)]
        save_file(tensors, weights, {"format": "pt"})
        try:
            LLM(name, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
        except Exception as error:
            say(str(error).splitlines()[0][:120])
            return "experts.1.down_proj" in str(error)
    say("loaded")
    return False


@contextmanager
def served(folder: Path, length: int) -> Iterator[Any]:
    """A client of `vllm serve` on the loopback interface; None where the server does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--served-model-name", "mythos",
        "--dtype", "float32",
        "--max-model-len", str(length), "--max-num-seqs", "4", "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not _healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                say("the server did not come up")
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


def serve(root: Path) -> bool:
    """`vllm serve` answers a completion as transformers does."""
    from transformers import AutoTokenizer

    import mythos_hf  # noqa: F401  transformers then knows the tokenizer

    folder = root / "tiny"
    with served(folder, 64) as client:
        if client is None:
            return False
        answer = client.completions.create(model="mythos", prompt="def main(", max_tokens=16, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def main(", return_tensors="pt", add_special_tokens=False).input_ids
    expected = tokenizer.decode(_likeliest(folder, tokens, 16), skip_special_tokens=True)
    say(json.dumps(answer.choices[0].text))
    return answer.choices[0].text == expected


def chat(root: Path) -> bool:
    """`vllm serve` answers /v1/chat/completions in the template of the folder as transformers does, and stops at the
    end of the turn, which generation_config.json names beside the end of text."""
    from transformers import AutoTokenizer

    import mythos_hf  # noqa: F401  transformers then knows the tokenizer

    folder = root / "chat"
    with served(folder, CHAT_LENGTH) as client:
        if client is None:
            return False
        answer = client.chat.completions.create(model="mythos", messages=MESSAGES, max_tokens=32, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
    tokens: Any = tokenizer.apply_chat_template(MESSAGES, **options)
    made = _likeliest(folder, tokens, 32)
    choice, expected = answer.choices[0], tokenizer.decode(made, skip_special_tokens=True)
    say(f"{json.dumps(choice.message.content)}, ended by {choice.finish_reason} after {len(made)} tokens")
    equal = choice.message.content == expected and answer.usage.prompt_tokens == tokens.shape[1]
    return equal and choice.finish_reason == "stop" and len(made) == ANSWER_TOKENS + 1


def _likeliest(folder: Path, tokens: Any, count: int) -> Any:
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


ROWS: dict[str, Callable[[Path], bool]] = {
    "tiny": Greedy("tiny"),
    "tiny, 7 loops": Greedy("tiny", n_loops=7),
    "latent": Greedy("latent"),
    "dense": Greedy("dense"),
    "chat": Greedy("chat"),
    "512 + 64, cache of latents": Greedy("wide", latents=True),
    "fp8, dequantised": Greedy("fp8", dequantised=True),
    "tiny, TP 2": Greedy("tiny", ranks=2),
    "tiny, 7 loops, TP 2": Greedy("tiny", n_loops=7, ranks=2),
    "tiny, TP 2 + EP": Greedy("tiny", ranks=2, whole_experts=True),
    "latent, TP 2": Greedy("latent", ranks=2),
    "512 + 64, cache of latents, TP 2": Greedy("wide", ranks=2, latents=True),
    "fp8, dequantised, TP 2": Greedy("fp8", ranks=2, dequantised=True),
    "tiny, TP 4, copied key/value heads": Greedy("tiny", ranks=4),
    "dense, TP 4, norms over all heads": Greedy("dense", ranks=4),
    "missing expert": refuses_missing_expert,
    "wrong folders, refused on 2 ranks": partial(refuse_on_every_rank, say),
    "fp8 blocks of 2 ranks, in place": partial(slices_of_fp8_blocks, say),
    "serve": serve,
    "serve, chat": chat,
}
"""Rows by name; each takes the folder of export_for_vllm.py, says what it saw, and whether it is right."""


def main() -> int:
    """Run one row, or all, each in a process of its own, and print a line for each."""
    os.environ.update(_QUIET)
    root = Path(sys.argv[1])
    if len(sys.argv) > 2:
        return 0 if ROWS[sys.argv[2]](root) else 1
    wrong = []
    for name in ROWS:
        began, clock = time.strftime("%H:%M:%S"), time.monotonic()
        command = [sys.executable, "-m", "tests.optional.vllm_parity", str(root), name]
        with tempfile.TemporaryFile("w+") as log:
            try:
                code = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=ROW_SECONDS)
                lines = [line[len(MARK) :] for line in code.stdout.splitlines() if line.startswith(MARK)]
                good = code.returncode == 0
            except subprocess.TimeoutExpired:
                good, lines = False, [f"not done after {ROW_SECONDS} s"]
            if not good:
                wrong.append(name)
                log.seek(0)
                sys.stdout.write("".join(log.readlines()[-40:]))
        verdict = "equal" if good else "DIFFERENT"
        _write(f"| {name} | {began} | {time.monotonic() - clock:.0f} s | {'; '.join([verdict, *lines])} |")
    _write(f"vLLM parity: {'equal' if not wrong else 'DIFFERENT: ' + ', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
