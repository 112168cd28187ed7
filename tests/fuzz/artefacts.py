"""Whole and small: a run's file, a model, a checkpoint, datasets, an index, tokenizers, a hostfile. Made once."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_ds.checkpoint import manifest
from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import ResolvedStage, resolve
from mythos_ds.data.chat_rows import conversation_of
from mythos_ds.data.datasets import prepare_index_cache
from mythos_ds.data.prepare import prepare_dataset
from mythos_ds.model.mythos import MythosModel
from mythos_ds.train.run_directory import RunDirectory
from mythos_ds.train.run_manifest import new_manifest
from mythos_ds.weights.model_folder import save_model
from tests.helpers.synthetic_checkpoint import write_synthetic
from tests.helpers.text_data import make_dataset, make_texts, make_tokenizer

SMALL = ["model.dim=16", "model.n_heads=2", "model.n_kv_heads=1", "model.ffn_dim=16", "model.expert_dim=8",
         "model.n_experts=4", "model.n_experts_per_tok=2", "model.lora_rank=2", "model.vocab_size=400",
         "training.seq_len=16", "training.micro_batch_size=2", "training.global_batch_size=4", "training.max_steps=4",
         "training.warmup_steps=1", "training.eval_batches=1"]  # fmt: skip
CLUSTER: dict[str, Any] = {"gpu": "h100", "nodes": 2, "gpus_per_node": 2}
TEXT = "ka lo mi ru"
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def run_config(root: Path, name: str = "train") -> list[str]:
    """Settings of the small run on a dataset below `root`."""
    data = root / "data"
    datasets = json.dumps([{"prefix": str(data / name)}])
    own = [f"data.datasets={datasets}", f"data.tokenizer={data / 'tokenizer.model'}", f"data.data_dir={data}"]
    return [*SMALL, *own, "data.split=[80,20,0]"]


def cluster(values: dict[str, Any] = CLUSTER) -> list[str]:
    """Settings of the `cluster` section, and a batch for its processes."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return ["training.global_batch_size=8", *(f"cluster.{key}={text}" for key, text in texts.items())]


def index_arguments(root: Path) -> dict[str, int]:
    """What the index below `root` was made for."""
    return {"seq_len": 16, "train_samples": 16, "valid_samples": 4, "seed": 0, "vocab_size": 400}


def build(root: Path) -> None:
    """Everything, below `root`."""
    data = root / "data"
    data.mkdir(parents=True)
    tokenizer = make_tokenizer(data)
    make_dataset(data / "train", tokenizer, make_texts(60, longest=40))
    (data / "chat_template.jinja").write_text(TEMPLATE)
    rows = (conversation_of({"prompt": text, "response": text}, "here") for text in make_texts(30, longest=8))
    prepare_dataset(rows, tokenizer_path=tokenizer.path, prefix=data / "chats", chat=True, shuffle_seed=None)
    settings = run_config(root)
    loaded = load_config("tiny", settings)
    resolved = resolve(loaded.config, 1)
    (root / "run.json").write_text(json.dumps(loaded.config.model_dump(mode="json", exclude_unset=True)))
    prepare_index_cache(loaded.config.data, **index_arguments(root))
    prepare_index_cache(load_config("tiny", run_config(root, "chats")).config.data, **index_arguments(root))
    save_model(MythosModel(loaded.config.model), root / "model", {"seq_len": 16, "step": 3})
    (root / "model" / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    write_synthetic(resolve(load_config("tiny", settings).config, 2), root / "checkpoints")
    run = RunDirectory(root / "run")
    run.root.mkdir()
    run.write_manifest(new_manifest(resolved))
    run.record_configuration([ResolvedStage(None, resolved)], loaded.text)
    run.record_start(0, 1, ["pretrain"])
    lines = [json.dumps({"text": text}) for text in make_texts(12, longest=20)]
    (root / "input.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "hostfile").write_text("gpu1 slots=8\ngpu2 slots=8\n# a comment\n", encoding="utf-8")


def sign(tag: Path) -> None:
    """Make a checkpoint's manifest fit its files again, so that damage is met by what reads them."""
    records = {}
    for path in manifest.data_files(tag):
        content = path.read_bytes()
        records[str(path.relative_to(tag))] = asdict(manifest.FileRecord(len(content), zlib.crc32(content)))
    (tag / manifest.MANIFEST).write_text(json.dumps({"format": 1, "files": records}))
