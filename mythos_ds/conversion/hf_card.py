"""The model card of a Hugging Face folder."""

import json
from typing import Any


def model_card(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """README.md of the folder."""
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in metadata.items() if name != "training")
    depth = config["mean_recurrence"]
    return f"""---
library_name: transformers
tags: [mythos, recurrent-depth, mixture-of-experts]
---
# A recurrent-depth mixture-of-experts model

{config["num_prelude_layers"]} + {config["num_recurrent_layers"]} x T + {config["num_coda_layers"]} layers of width
{config["hidden_size"]}, {config["n_routed_experts"]} experts, {config["num_experts_per_tok"]} per token;
T = {depth} unless `n_loops` says otherwise (trained with up to {config["max_loops"]}).

```python
import mythos_hf  # from the mythos_ds repository; makes the Auto classes know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, n_loops={2 * depth})[0]))
```

| fact | value |
|---|---|
{rows}
"""
