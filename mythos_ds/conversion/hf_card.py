"""The model card of a Hugging Face folder, and what a source's card says."""

import json
import re
from pathlib import Path
from typing import Any

from mythos_ds.data.tokenizer_files import CARD_MARK

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROMPT = "The"
_CARDS = ("SOURCE_README.md", "README.md")


def source_metadata(folder: Path) -> dict[str, str]:
    """ "base_model" and "license" of a model's folder, as far as its configuration, its place and its card say."""
    found = {"base_model": _hub_name(folder)}
    for card in (folder / name for name in _CARDS):
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        for name in ("license", "base_model"):
            line = front and re.search(rf"^{name}:[ \t]*(?:\n[ \t]*-)?[ \t]*(\S+)[ \t]*$", front[1], re.MULTILINE)
            if line and not found.get(name):
                found[name] = line[1].strip("\"'")
    return {name: value for name, value in found.items() if value}


def _hub_name(folder: Path) -> str:
    """The source's name on the hub, where its folder is of the hub's cache or its configuration says it."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(folder.resolve()))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return given if isinstance(given, str) and _HUB_NAME.fullmatch(given) and not Path(given).exists() else ""


def model_card(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """README.md of the folder."""
    rows = "\n".join(
        f"| {name} | {json.dumps(value)} |"
        for name, value in metadata.items()
        if name not in ("training", "sample_prompt")
    )
    depth = config["mean_recurrence"]
    prompt = metadata.get("sample_prompt", _PROMPT)
    front = "".join(f"{name}: {metadata[name]}\n" for name in ("base_model", "license") if metadata.get(name))
    return f"""---
library_name: transformers
tags: [mythos, recurrent-depth, mixture-of-experts]
{front}---
{CARD_MARK}

{config["num_prelude_layers"]} + {config["num_recurrent_layers"]} x T + {config["num_coda_layers"]} layers of width
{config["hidden_size"]}, {config["n_routed_experts"]} experts, {config["num_experts_per_tok"]} per token;
T = {depth} unless `n_loops` says otherwise (trained with up to {config["max_loops"]}).

```python
import mythos_hf  # from the mythos_ds repository; makes the Auto classes know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt", add_special_tokens=False)  # any text
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, n_loops={2 * depth})[0]))
```

| fact | value |
|---|---|
{rows}
"""
