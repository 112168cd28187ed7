"""Loops per request on vLLM against transformers, in an environment that has vLLM: each request of a batch at its own
count, prefixes that other counts have cached, requests that cannot be obeyed, the second runner's interface; and
lm-eval on a server.

    make vllm-parity

runs it on folders of export_for_vllm.py. One row for each comparison: name, seconds of start and of run, result.
"""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest import mock

from tests.optional import lm_eval_parity
from tests.optional.vllm_parity import NEW_TOKENS, PROMPT_LENGTHS, say, served

LOOPS = (1, 2, 4, 3)
PREFIX, BLOCK = 200, 128
"""Tokens of a prompt that is sent at several counts, and those that whole blocks of the CPU's cache hold of it."""
WRONG: tuple[Any, ...] = (0, "two", 2.5, True, 5)


def row(name: str, start: float, run: float, result: str, equal: bool) -> bool:
    """Say one row of the table; whether it holds."""
    say(f"LOOPS | {name} | start {start:.0f} s | run {run:.0f} s | {result} | {'equal' if equal else 'DIFFERENT'}")
    return equal


class Compared:
    """An engine in this process, and transformers' model of the same folder."""

    def __init__(self, folder: str, length: int):
        import torch
        from vllm import LLM

        import mythos_hf

        begun = time.monotonic()
        sizes = {"max_model_len": length, "max_num_seqs": 8}
        self.engine = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **sizes)
        self.start = time.monotonic() - begun
        executor: Any = self.engine.llm_engine.model_executor
        self.runner = executor.driver_worker.worker.model_runner
        self.reference = mythos_hf.MythosForCausalLM.from_pretrained(folder).eval()
        self.known: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        self.random = torch.Generator().manual_seed(0)

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        import torch

        return torch.randint(4, self.reference.config.vocab_size, (length,), generator=self.random).tolist()

    def ask(self, prompts: list[Any], loops: list[Any], new_tokens: int = NEW_TOKENS) -> list[Any]:
        """vLLM's outputs of a batch; None for the server's loops."""
        from vllm import SamplingParams

        common: dict[str, Any] = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
        settings = [
            SamplingParams(**common, extra_args=None if count is None else {"n_loops": count}) for count in loops
        ]
        return self.engine.generate(prompts, settings, use_tqdm=False)

    def equal(self, prompt: list[int], loops: int, output: Any) -> bool:
        """Whether vLLM's tokens are transformers' at these loops."""
        import torch

        made = list(output.outputs[0].token_ids)
        asked = (tuple(prompt), loops, len(made))
        if asked not in self.known:
            options = {"max_new_tokens": len(made), "do_sample": False, "eos_token_id": None, "n_loops": loops}
            self.known[asked] = self.reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        return self.known[asked] == made


def batches(compared: Compared, name: str) -> bool:
    """Requests of other counts in one batch: transformers' tokens, and experts that see only the rows that run."""
    prompts = [compared.prompt(length) for length in PROMPT_LENGTHS]
    seen: list[int] = []
    layers = compared.runner.model.model.recurrent.layers
    hooks = [each.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))) for each in layers]
    begun = time.monotonic()
    outputs = compared.ask([{"prompt_token_ids": prompt} for prompt in prompts], list(LOOPS))
    run = time.monotonic() - begun
    for hook in hooks:
        hook.remove()
    same = sum(map(compared.equal, prompts, LOOPS, outputs))
    forwards = [(length + NEW_TOKENS - 1) * count for length, count in zip(PROMPT_LENGTHS, LOOPS, strict=True)]
    expected = len(layers) * sum(forwards)
    result = f"{same} of {len(prompts)} prompts x {NEW_TOKENS} tokens, experts saw {sum(seen)} of {expected} rows"
    return row(name, compared.start, run, result, same == len(prompts) and sum(seen) == expected)


def prefixes(compared: Compared) -> bool:
    """A prompt at several counts, with and without a salt of its own: blocks are shared at the same count only."""
    prompt = compared.prompt(PREFIX)
    plain, own = {"prompt_token_ids": prompt}, {"prompt_token_ids": prompt, "cache_salt": "4"}
    sent = [
        (plain, 1, 0),
        (plain, 4, 0),
        (plain, 2, 0),
        (plain, None, BLOCK),
        (plain, 1, BLOCK),
        (own, 4, 0),
        (own, 1, 0),
    ]
    begun = time.monotonic()
    same = 0
    for request, loops, cached in sent:
        (output,) = compared.ask([request], [loops], 16)
        served_loops = compared.reference.config.n_loops if loops is None else loops
        same += output.num_cached_tokens == cached and compared.equal(prompt, served_loops, output)
    result = f"{same} of {len(sent)} requests with a prefix of {BLOCK} tokens"
    return row("prefix at other counts", 0, time.monotonic() - begun, result, same == len(sent))


def refusals(compared: Compared) -> bool:
    """Counts that cannot run end offline requests too."""
    refused = 0
    for count in WRONG:
        try:
            compared.ask([{"prompt_token_ids": [5, 6]}], [count], 1)
        except Exception as error:
            refused += f"vllm_xargs.n_loops: given {count!r}; allowed: a whole number from 1 to 4" in str(error)
    (output,) = compared.ask([{"prompt_token_ids": [5, 6]}], [2], 4)  # the engine goes on
    result = f"{refused} of {len(WRONG)} refused"
    return row("offline refusals", 0, 0, result, refused == len(WRONG) and compared.equal([5, 6], 2, output))


def configuration(folder: str, **options: Any) -> Any:
    """What `vllm serve` would make of these options."""
    from vllm import EngineArgs

    return EngineArgs(folder, skip_tokenizer_init=True, max_model_len=64, **options).create_engine_config()


def runner(*, second: bool) -> Any:
    """Where configurations get the second model runner, as on a GPU, which has Triton; or the first, as on a CPU."""
    return mock.patch("vllm.config.vllm.HAS_TRITON", second)


def configurations(folder: str) -> bool:
    """What servers started otherwise say to a request with loops, by vLLM's own configuration of each."""
    from mythos_vllm.loop_admission import loop_server

    draft = {"method": "ngram", "num_speculative_tokens": 2}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    cases: list[tuple[dict[str, Any], bool, str]] = [
        ({}, False, ""),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, False, "the worker is vllm.v1.worker.cpu_worker"),
        ({"compilation_config": {"mode": 1}}, False, "--enforce-eager"),
        ({"speculative_config": draft}, False, "speculative decoding"),
        ({"kv_transfer_config": transfer}, False, "other servers"),
        ({}, True, "mythos_experimental_loops"),
        ({"additional_config": {"mythos_experimental_loops": True}}, True, ""),
    ]
    good, begun = 0, time.monotonic()
    for options, second, message in cases:
        with runner(second=second):
            server = loop_server(configuration(folder, **options))
        assert server is not None
        found = "; ".join(server.obstacles)
        as_said = message in found if message else not found
        good += as_said
        if not as_said:
            say(f"{options}: {found!r}; expected: {message!r}")
    result = f"{good} of {len(cases)} servers as described"
    return row("other servers", 0, time.monotonic() - begun, result, good == len(cases))


def second_runner(compared: Compared, folder: str) -> bool:
    """The second runner's interface, by vLLM's own classes: what its state hands the model's forward is what the first
    runner does for the same requests, in whatever order it holds them."""
    import numpy as np
    import torch
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_states import init_model_state
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    model, prompts = compared.runner.model, [compared.prompt(length) for length in PROMPT_LENGTHS]
    handed: list[Any] = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: handed.append(kw.get("loop_counts")), with_kwargs=True)
    compared.ask([{"prompt_token_ids": prompt} for prompt in prompts], list(LOOPS), 1)
    compared.ask([{"prompt_token_ids": prompts[0]}], [None], 1)
    hook.remove()

    def state(**options: Any) -> Any:
        """The state that the runner makes for the model on a server with these options."""
        with runner(second=True):
            model.vllm_config = configuration(folder, **options)
            return init_model_state(model.vllm_config, model, None, torch.device("cpu"))

    before = model.vllm_config
    plain, made = state(), state(additional_config={"mythos_experimental_loops": True})
    model.vllm_config = before
    places = [3, 0, 2, 1]
    starts = np.cumsum([0, *PROMPT_LENGTHS])
    buffers = InputBuffers(8, 64, torch.device("cpu"))
    dummy = InputBatch.make_dummy(len(places), int(starts[-1]), buffers)
    batch = dataclasses.replace(dummy, idx_mapping_np=np.array(places), query_start_loc_np=starts)

    def add(loops: list[int | None]) -> dict[str, Any]:
        """The keywords of the forward once these requests are held."""
        for place, prompt, count in zip(places, prompts, loops, strict=True):
            asked = SamplingParams(extra_args=None if count is None else {"n_loops": count})
            made.add_request(place, NewRequestData("a", prompt, [], asked, None, ([],), 0, None))
        return made.prepare_inputs(batch, None)

    keywords = add(list(LOOPS))
    good = [
        type(plain) is DefaultModelState,
        torch.equal(keywords["loop_counts"], handed[0]),
        add([None] * 4) == {} and handed[-1] is None,  # new requests in the places of old ones
        inspect.signature(model.forward).bind(input_ids=None, positions=None, inputs_embeds=None, **keywords)
        is not None,
        "loop_counts" not in made.prepare_dummy_inputs(4, 16),
    ]
    return row("the second runner's interface", 0, 0, f"{sum(good)} of {len(good)} points", all(good))


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status and the answer of a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def over_http(folder: str, python: str) -> bool:
    """A server obeys vllm_xargs, answers 400 to what it cannot do, and agrees with lm-eval's own model."""
    begun = time.monotonic()
    with served(Path(folder), 256) as client:
        if client is None:
            return False
        start, url = time.monotonic() - begun, str(client.base_url).rstrip("/")
        begun = time.monotonic()
        common = {"model": "mythos", "prompt": "def main(", "max_tokens": 16, "temperature": 0}
        answers = [post(f"{url}/completions", {**common, "vllm_xargs": {"n_loops": count}}) for count in LOOPS]
        wrong: list[tuple[str, dict[str, Any]]] = [
            *(("completions", {"vllm_xargs": {"n_loops": count}}) for count in WRONG),
            ("completions", {"n_loops": 2}),
            ("completions", {"n_loops": True}),
            ("completions", {"vllm_xargs": {"n_loop": 2}}),
            ("completions", {"vllm_xargs": {"n_loops": 0}, "stream": True}),
            ("completions", {"vllm_xargs": {"n_loops": 2}, "use_beam_search": True, "n": 2}),
            ("chat/completions", {"vllm_xargs": {"n_loops": 5}, "messages": [{"role": "user", "content": "a"}]}),
        ]
        refused = [post(f"{url}/{route}", {**common, **body}) for route, body in wrong]
        run = time.monotonic() - begun
        same = answered(folder, answers)
        bad = sum(status == 400 and "n_loop" in answer["error"]["message"] for status, answer in refused)
        for (route, body), (status, answer) in zip(wrong, refused, strict=True):
            if status != 400:
                say(f"{route} {body}: {status} {answer}")
        result = f"{same} of {len(LOOPS)} texts, {bad} of {len(wrong)} refused with 400"
        equal = row("over HTTP", start, run, result, same == len(LOOPS) and bad == len(wrong))
        begun = time.monotonic()
        agree, words = lm_eval_parity.compare(python, folder, url)
        return row("lm-eval: hf and local-completions", 0, time.monotonic() - begun, words, agree) and equal


def answered(folder: str, answers: list[tuple[int, Any]]) -> int:
    """How many of a server's answers at LOOPS are transformers' texts."""
    from transformers import AutoTokenizer

    import mythos_hf

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = mythos_hf.MythosForCausalLM.from_pretrained(folder).eval()
    tokens = tokenizer("def main(", return_tensors="pt", add_special_tokens=False).input_ids
    same = 0
    for count, (status, answer) in zip(LOOPS, answers, strict=True):
        made = model.generate(tokens, max_new_tokens=16, do_sample=False, n_loops=count)[0, tokens.shape[1] :]
        same += status == 200 and answer["choices"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True)
    return same


def main() -> int:
    """Each engine in a process of its own, since vLLM starts once per process: `tiny FORMS REMOTE PYTHON`, where FORMS
    differs from tiny in injection and adapters, REMOTE is tiny with its code and PYTHON has lm-eval."""
    os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    if sys.argv[1] in ("--all", "--batch"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is looked into
    if sys.argv[1] == "--all":
        folder = sys.argv[2]
        compared = Compared(folder, 256)
        good = [
            batches(compared, "tiny, 1, 2, 4 and 3 loops in one batch"), prefixes(compared), refusals(compared),
            second_runner(compared, folder), configurations(folder),
        ]  # fmt: skip
        return int(not all(good))
    if sys.argv[1] == "--batch":
        name = f"{Path(sys.argv[2]).name}, 1, 2, 4 and 3 loops in one batch"
        return int(not batches(Compared(sys.argv[2], 64), name))
    tiny, forms, remote, python = sys.argv[1:]
    command = [sys.executable, "-m", "tests.optional.vllm_request_loops"]
    runs = [["--all", tiny], ["--batch", forms]]
    codes = [subprocess.run([*command, *run], timeout=900).returncode for run in runs]
    equal = over_http(remote, python) and not any(codes)
    say(f"loops per request: {'equal' if equal else 'DIFFERENT'}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
