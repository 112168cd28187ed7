"""Generation by plain forwards: no cache, every rank in step (ZeRO-3 gathers weights on all of them)."""

import torch

from mythos_ds.engine.engine import TrainingEngine
from mythos_ds.parallel.groups import ParallelGroups


def generate(
    engine: TrainingEngine,
    groups: ParallelGroups,
    prompt: list[int],
    *,
    new_tokens: int,
    n_loops: int,
    vocab_size: int,
    eos_id: int,
    context_length: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` by up to `new_tokens` ids, ending at `eos_id`; every rank returns the same list.

    temperature 0 is greedy. Ids from `vocab_size` on (rows the tokenizer has no piece for) are never drawn. At most
    the last `context_length` tokens are seen.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt) or [eos_id]
    given = len(tokens)
    for _ in range(new_tokens):
        window = torch.tensor([tokens[-context_length:]], dtype=torch.int64, device=groups.device)
        logits = engine.logits(window, n_loops)[0, -1, :vocab_size]
        # Each rank's sums may round differently: rank 0 decides.
        drawn = _draw(logits, temperature, generator) if groups.rank == 0 else 0
        token = round(groups.sum([float(drawn)])[0])
        if token == eos_id:
            break
        tokens.append(token)
    return tokens[given:]


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """One id from logits [vocab]."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
