"""Text continued token by token with plain forwards: no cache, so any model and any loop count."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

_COLDEST = 1e-6


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    new_tokens: int,
    vocab_size: int,
    eos_id: int,
    context_length: int,
    temperature: float = 0.8,
    seed: int = 0,
    broadcast: Callable[[int], int] | None = None,
    ends: Collection[int] = (),
    on_token: Callable[[list[int]], object] = lambda new: None,
) -> list[int]:
    """Continues `prompt` by up to `new_tokens` ids, ending at `eos_id` or one of `ends`.

    next_logits: tokens int64 [1, seq] -> logits [vocab] of the token after them. temperature 0 is greedy. Ids from
    `vocab_size` on (rows the tokenizer has no piece for) are never drawn. At most the last `context_length` tokens are
    seen. broadcast: gives one process's token to all that generate together, whose sums may round differently.
    on_token: takes all new ids after each.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt) or [eos_id]
    given = len(tokens)
    for _ in range(new_tokens):
        logits = next_logits(torch.tensor([tokens[-context_length:]], dtype=torch.int64))[:vocab_size]
        token = _draw(logits, temperature, generator)
        if broadcast is not None:
            token = broadcast(token)
        if token == eos_id or token in ends:
            break
        tokens.append(token)
        on_token(tokens[given:])
    return tokens[given:]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Draws one id from logits [vocab]."""
    logits = logits.float().cpu()
    if temperature < _COLDEST:  # one id has all of the probability; dividing by less overflows
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
