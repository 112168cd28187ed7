"""The exported Hugging Face model says what the training model says: logits, cached and batched generation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mythos_ds
from mythos_ds.conversion.convert import Request, plan_route
from mythos_ds.conversion.huggingface import hf_config, hf_notes
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import CheckpointError, ConfigError
from mythos_ds.model.mythos import MythosModel
from mythos_ds.weights.model_folder import load_model, read_metadata, save_model
from mythos_ds.weights.writer import write_tensors
from tests.helpers.toy_model import toy_model

transformers = pytest.importorskip("transformers")
import mythos_hf
from tests.helpers.paths import ROOT

TINY = ROOT / "models" / "tiny"
GQA: dict[str, Any] = {
    "attn_type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kv_lora_rank": None, "q_lora_rank": None,
    "qk_nope_head_dim": None, "qk_rope_head_dim": None, "v_head_dim": None,
}  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "latent": {},
    "latent, full-rank query, wide values": {"q_lora_rank": None, "v_head_dim": 16, "lora_rank": 0},
    "grouped": {**GQA, "qk_norm": True},
    "grouped, tied, interleaved": {**GQA, "tie_embeddings": True, "rope_interleaved": True, "rope_theta": 500000.0},
    "post, zero-order hold": {**GQA, "injection": "post", "discretisation": "zoh", "initial_state": "embedding"},
    "direct, raw embedding, softmax": {
        **GQA, "injection": "post", "discretisation": "direct", "loop_embedding": "raw", "router_score": "softmax",
        "lora_target": "output", "prelude_norm": False,
    },
    "groups of experts": {"n_expert_groups": 4, "n_limited_groups": 2, "route_scale": 2.5, "n_shared_experts": 2},
    "no shared expert, no coda": {"n_shared_experts": 0, "coda_layers": 0, "loop_embedding": "none"},
    "bf16 state": {"state_dtype": "bfloat16"},
    "a gate": {"halting": "gate"},
}  # fmt: skip


def make_folder(folder: Path, changes: dict[str, Any]) -> MythosModel:
    """A model with random weights everywhere, also where training starts from zero."""
    model = MythosModel(toy_model(**changes), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            if name.endswith(("w2", "w2.weight", "o.weight", "up.weight")):
                parameter.normal_(std=0.1, generator=generator)
        for layer in model.moe_layers():
            layer.router.bias.normal_(std=0.3, generator=generator)
            layer.router.loop_bias.normal_(std=0.3, generator=generator)
            layer.router.loop_updates[:3] = 200.0
    save_model(model, folder, {"seq_len": 64})
    return model.eval()


def exported(tmp_path: Path, changes: dict[str, Any], **options: Any) -> tuple[MythosModel, Any]:
    model = make_folder(tmp_path / "ours", changes)
    mythos_ds.convert(tmp_path / "ours", tmp_path / "hf", dtype="float32", **options)
    return model, mythos_hf.MythosForCausalLM.from_pretrained(tmp_path / "hf").eval()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_cached_generation(name, tmp_path):
    ours, theirs = exported(tmp_path, CONFIGURATIONS[name])
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    depth = ours.config.mean_recurrence
    with torch.inference_mode():
        for loops in (1, depth, 2 * depth):
            logits = ours(tokens, n_loops=loops)
            assert (theirs(tokens, n_loops=loops).logits - logits).abs().max() <= 1e-5, loops
        for loops in (1, 2 * depth):
            options = {"max_new_tokens": 16, "do_sample": False, "n_loops": loops}
            cached = theirs.generate(tokens[:1, :8], **options)
            assert torch.equal(cached, theirs.generate(tokens[:1, :8], use_cache=False, **options)), loops


def test_64_cached_tokens_are_the_uncached_ones_and_batches_are_single_prompts(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ours = load_model(TINY)
    prompts = ["def main(", "The function returns", "import os\n", "class A:\n    "]
    with torch.inference_mode():
        for loops in (1, 4, 8):
            options = {"max_new_tokens": 64, "do_sample": False, "n_loops": loops}
            tokens = tokenizer(prompts[0], return_tensors="pt", add_special_tokens=False).input_ids
            cached = model.generate(tokens, **options)
            assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
            again = tokens
            for _ in range(64):
                again = torch.cat([again, ours(again, n_loops=loops)[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(cached, again), loops
        options = {"max_new_tokens": 16, "do_sample": False, "n_loops": 4}
        single = [
            model.generate(tokenizer(p, return_tensors="pt", add_special_tokens=False).input_ids, **options)[0, -16:]
            for p in prompts
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        together = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)[:, -16:]
        assert torch.equal(together, torch.stack(single))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_gives_the_same_tokens(attention, tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(10, 4000, (n,), generator=generator).tolist() for n in (5, 17, 9)]
    settings = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
    for loops in (4, 6):
        model.config.n_loops = loops
        results = model.generate_batch(prompts, settings, small, warmup=False)
        produced = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
        for prompt in prompts:
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert produced[tuple(prompt)] == alone[0, len(prompt) :].tolist(), loops


def test_loops_can_be_set_when_loading_and_caching_turned_off(tiny):
    tokens = torch.tensor([[5, 77, 312, 2044]])
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny).eval()
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False, n_loops=8)
    settings = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(tokens, generation_config=settings, n_loops=8), expected)
    assert torch.equal(model.generate(tokens, settings, n_loops=8), expected)
    deeper = mythos_hf.MythosForCausalLM.from_pretrained(tiny, n_loops=8).eval()
    assert torch.equal(deeper.generate(tokens, max_new_tokens=12, do_sample=False), expected)
    eager = mythos_hf.MythosForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    assert torch.equal(eager.generate(tokens, max_new_tokens=12, do_sample=False, n_loops=8), expected)


def test_what_transformers_saves_comes_back_as_a_model_folder(tiny, tmp_path):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "saved")
    given, saved = load_file(tiny / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert given.keys() == saved.keys()
    mythos_ds.convert(tmp_path / "saved", tmp_path / "back", from_format="hf", to_format="mythos")
    before, after = load_model(TINY).state_dict(), load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_metadata(tmp_path / "back") == read_metadata(TINY)
    base = transformers.AutoModel.from_pretrained(tiny)
    tokens = torch.tensor([[5, 77, 312]])
    assert torch.equal(model.lm_head(base(tokens).last_hidden_state), model(tokens).logits)


def test_a_folder_without_a_tokenizer_or_with_other_quantisation_is_told(tiny, tmp_path):
    mythos_hf.MythosForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "saved")
    request = Request("hf", "mythos", tmp_path / "saved", None)
    assert plan_route(request).notes == [f"no tokenizer is written: {tmp_path / 'saved'} has none"]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantization_config: given 'bitsandbytes'; allowed: none, or fp8"):
        plan_route(request)


@pytest.mark.parametrize("rows", [4099, 4160])
def test_added_tokens_and_their_rows_come_back(rows, tiny, tmp_path):
    model, tokenizer = (
        mythos_hf.MythosForCausalLM.from_pretrained(tiny),
        transformers.AutoTokenizer.from_pretrained(tiny),
    )
    tokenizer.add_tokens(["<|user|>", "<|answer|>"], special_tokens=True)
    tokenizer.add_tokens(["newword"])
    tokenizer.chat_template = "{% for message in messages %}{{ '<|user|>' + message.content }}{% endfor %}"
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    mythos_ds.convert(tmp_path / "tuned", tmp_path / "back", from_format="hf", to_format="mythos")
    ours = load_model(tmp_path / "back")
    tokens = torch.tensor([[5, 4096, 77, 4098, 312]])
    with torch.no_grad():
        expected = model.eval()(tokens, n_loops=4).logits
        assert (ours(tokens, n_loops=4) - expected).abs().max() <= 1e-5
    own, first = Tokenizer.load(tmp_path / "back"), Tokenizer.load(TINY)
    assert (own.eos_id, own.pad_id, own.vocab_size) == (first.eos_id, first.pad_id, 4099)
    assert (own.special_tokens["<|answer|>"], own.encode("newword")[-1]) == (4097, 4098)
    assert own.encode("</s> def main(") == first.encode("</s> def main(")
    mythos_ds.convert(tmp_path / "back", tmp_path / "again", dtype="float32")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    chat = [{"role": "user", "content": "a newword </s>"}]
    assert again.apply_chat_template(chat).input_ids == tokenizer.apply_chat_template(chat).input_ids
    model.resize_token_embeddings(4090)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="tuned: has 4099 pieces; allowed: at most the model's 4090"):
        mythos_ds.convert(tmp_path / "tuned", tmp_path / "short", from_format="hf", to_format="mythos")


def test_a_gate_is_left_out_and_said(tmp_path):
    make_folder(tmp_path / "ours", {"halting": "gate"})
    assert "gate is left out" in hf_notes(tmp_path / "ours")[0]
    assert hf_notes(TINY) == []


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder{options}).eval()
tokenizer = AutoTokenizer.from_pretrained(folder{options})
tokens = tokenizer("def main(", return_tensors="pt", add_special_tokens=False).input_ids
assert not any(name.startswith("mythos_ds") for name in sys.modules)
options = {{"max_new_tokens": 8, "do_sample": False, "n_loops": 6}}
cached = model.generate(tokens, **options)
assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
print(cached[0].tolist())
"""


@pytest.mark.parametrize("remote", [False, True])
def test_a_fresh_process_needs_the_folder_and_the_package_only(remote, tiny, tmp_path):
    folder = tiny
    if remote:
        folder = tmp_path / "remote"
        mythos_ds.convert(TINY, folder, dtype="float32", with_remote_code=True)
    code = FRESH.format(
        imports="" if remote else "import mythos_hf", options=", trust_remote_code=True" if remote else ""
    )
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny)
    tokens = torch.tensor([Tokenizer.load(TINY / "tokenizer.model").encode("def main(")])
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False, n_loops=6)[0].tolist()
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_no_code_travels_unless_it_is_asked_for(tiny):
    assert not list(tiny.glob("*.py"))
    assert "auto_map" not in json.loads((tiny / "config.json").read_text())


def test_the_tokenizer_has_the_same_ids(tiny):
    fast, own = transformers.AutoTokenizer.from_pretrained(tiny), Tokenizer.load(TINY / "tokenizer.model")
    for text in (
        (ROOT / "mythos_ds" / "model" / "moe.py").read_text(), "  two  spaces\tand\ttabs\n\n\n", "漢字 🙂 ñ \x00\x7f",
        "", " ", "x" * 300, "1234567890", "</s> <s> <unk>",
    ):  # fmt: skip
        ids = own.encode(text)
        assert fast(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids, text[:40]
        assert fast.decode(ids) == own.decode(ids), text[:40]


def in_small_files(folder: Path, output: Path) -> None:
    """A model folder as a Hugging Face folder, fp32, in files of at most 50 kB."""
    route = plan_route(Request("mythos", "hf", folder, "float32"))
    write_tensors(route.source, output, max_file_bytes=50_000)
    route.finish(output)


def test_there_and_back_is_bit_equal(tmp_path):
    for name, changes in (("a", CONFIGURATIONS["grouped"]), ("b", {}), ("c", {**GQA, "tie_embeddings": True})):
        make_folder(tmp_path / name, changes)
        in_small_files(tmp_path / name, tmp_path / f"{name}_hf")
        mythos_ds.convert(tmp_path / f"{name}_hf", tmp_path / f"{name}_back", from_format="hf", to_format="mythos")
        in_small_files(tmp_path / f"{name}_back", tmp_path / f"{name}_again")
        before, after = load_model(tmp_path / name).state_dict(), load_model(tmp_path / f"{name}_back").state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        written = [*(tmp_path / f"{name}_hf").glob("*.safetensors*"), tmp_path / f"{name}_hf" / "config.json"]
        for path in written:
            assert path.read_bytes() == (tmp_path / f"{name}_again" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "a_hf").glob("*.safetensors"))) > 1


def test_bf16_keeps_fp32_where_the_model_computes_in_fp32(tmp_path):
    make_folder(tmp_path / "ours", {})
    mythos_ds.convert(tmp_path / "ours", tmp_path / "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["model.recurrent.layers.0.mlp.router.weight"].dtype == torch.float32
    assert stored["model.recurrent.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16
    model = mythos_hf.MythosForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert model.model.recurrent.injection.log_A.dtype == torch.float32
    assert model.model.recurrent.layers[0].mlp.router.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    tokens = torch.randint(0, 64, (1, 12))
    with torch.inference_mode():
        assert torch.isfinite(model(tokens, n_loops=8).logits).all()


def test_a_folder_that_is_not_whole_fails_loudly(tmp_path):
    exported(tmp_path, CONFIGURATIONS["grouped"])
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.recurrent.layers.1.mlp.experts.5.down_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        mythos_hf.MythosForCausalLM.from_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError):
        plan_route(Request("hf", "mythos", tmp_path / "hf", None))


def test_without_the_expert_mapping_loading_fails(tmp_path):
    exported(tmp_path, CONFIGURATIONS["grouped"])
    code = (
        "import sys, mythos_hf\n"
        "from transformers import conversion_mapping as c\n"
        "c.register_checkpoint_conversion_mapping('mythos', [], overwrite=True)\n"
        "mythos_hf.MythosForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode != 0
    assert "not a whole model" in result.stderr


def test_what_transformers_cannot_run_is_refused(tmp_path):
    make_folder(tmp_path / "ours", {"halting": "act"})
    with pytest.raises(CheckpointError, match="halting"):
        hf_config(tmp_path / "ours", "float32")
    with pytest.raises(CheckpointError, match="halting"):
        mythos_ds.convert(tmp_path / "ours", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_loop_counts_below_one_are_refused(tiny):
    model = mythos_hf.MythosForCausalLM.from_pretrained(tiny)
    with pytest.raises(ValueError, match="n_loops"):
        model(torch.tensor([[1]]), n_loops=0)


def test_the_loss_is_a_mean_or_what_a_trainer_that_accumulates_asks_for(tmp_path):
    _, model = exported(tmp_path, {})
    tokens = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
        part = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(64))
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert part.loss.item() == pytest.approx(expected.item() * 16 / 64, rel=1e-5)
