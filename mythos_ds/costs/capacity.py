"""How many tokens a server's cache holds on given GPUs: memory less weights and a reserve, over a token's bytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.serving import (
    FP8_BLOCK,
    Division,
    misfit,
    rank_cache_bytes,
    rank_weight_bytes,
    tensor_parallel,
    token_cache,
)
from mythos_ds.errors import OptionError
from mythos_ds.formatting import byte_text, markdown_table, number_text
from mythos_ds.hardware import GPUS, Gpu

MEMORY_SHARE = 0.92
"""Of a GPU's memory that a server may take: what vLLM 0.32 takes unless told (`--gpu-memory-utilization`)."""
RESERVE_BYTES = 6e9
"""For activations of a step, CUDA graphs, communicators and the context: an assumption, measured on no GPU."""
LEAST_TOKENS = 32_768
"""Tokens that each replica must have room for at the mean of training, for a number of GPUs to count as enough."""
MOST_GPUS = 1024
HEADER = ["preset", "matrices", "GPUs", "tensor x data", "weights", "for the cache", "one replica", "all, T / 2",
          "all, T", "all, largest"]  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """What each GPU of a server has room for.

    Attributes:
        division: of the model among GPUs; each data-parallel replica has a cache of its own.
        weights: bytes of the fullest GPU.
        room: bytes left for its cache, below zero where the weights do not fit.
    """

    model: ModelConfig
    division: Division
    weights: int
    room: float

    def replica_tokens(self, n_loops: int) -> int:
        """Tokens that one replica's cache holds, so the longest sequence too."""
        return max(0, int(self.room // rank_cache_bytes(self.model, n_loops, self.division.tensor)))

    def tokens(self, n_loops: int) -> int:
        """Tokens that the caches of all replicas hold."""
        return self.division.data * self.replica_tokens(n_loops)


def serving_capacity(
    model: ModelConfig,
    gpu: Gpu,
    division: Division,
    *,
    fp8: bool,
    share: float = MEMORY_SHARE,
    reserve: float = RESERVE_BYTES,
) -> Capacity:
    """What is left on each GPU of a server whose cache is in bfloat16. The division must fit the model (`misfit`)."""
    weights = rank_weight_bytes(model, division, fp8=fp8)
    return Capacity(model, division, weights, share * gpu.memory_bytes - weights - reserve)


def divisions(model: ModelConfig, gpu: Gpu, gpus: int, *, fp8: bool) -> list[Division]:
    """Tensor parallel inside a node, replicas of attention over the rest, experts whole over all: every such division
    of `gpus` GPUs that the model allows, the largest tensor-parallel size first."""
    sizes = [
        size for size in range(1, min(gpus, gpu.gpus_per_node) + 1) if gpus % size == gpu.gpus_per_node % size == 0
    ]
    found = [Division(size, gpus // size) for size in reversed(sizes)]
    return [division for division in found if misfit(model, division, fp8=fp8) is None]


def smallest_server(model: ModelConfig, gpu: Gpu, *, fp8: bool) -> list[Capacity]:
    """The smallest power of two of GPUs on which each replica has room for LEAST_TOKENS, by division; empty where no
    division fits."""
    gpus = 1
    while gpus <= MOST_GPUS:
        made = [serving_capacity(model, gpu, one, fp8=fp8) for one in divisions(model, gpu, gpus, fp8=fp8)]
        enough = [one for one in made if one.replica_tokens(model.mean_recurrence) >= LEAST_TOKENS]
        if enough:
            return enough
        gpus *= 2
    return []


def require_gpus(gpu: Gpu, gpus: int) -> None:
    """Raises OptionError for a number of GPUs that is neither a part of a node nor whole nodes."""
    node = gpu.gpus_per_node
    if gpus < 1 or (node % gpus and gpus % node):
        allowed = sorted({*(size for size in range(1, node + 1) if node % size == 0), node * max(1, gpus // node)})
        nearest = min(allowed, key=lambda size: abs(size - gpus))
        raise OptionError(f"--gpus: given {gpus}; allowed: divisors and multiples of {node}; nearest: {nearest}")


def capacity_cells(made: Capacity, loops: Sequence[int]) -> list[str]:
    """GPUs, division, bytes, tokens of a replica at T, and of all at each of `loops`, as texts."""
    division, one = made.division, made.replica_tokens(made.model.mean_recurrence)
    cells = [str(division.gpus), f"{division.tensor} x {division.data}", byte_text(made.weights), byte_text(made.room)]
    return [*cells, number_text(one), *(number_text(made.tokens(n_loops)) for n_loops in loops)]


def _rows(presets: Iterable[tuple[str, ModelConfig]], gpu: Gpu) -> Iterator[list[str]]:
    """A row for the most and the least tensor-parallel division of each preset's smallest server, in each type."""
    for name, model in presets:
        loops = (max(1, model.mean_recurrence // 2), model.mean_recurrence, model.max_loops)
        for kept in ("bfloat16", "fp8"):
            made = smallest_server(model, gpu, fp8=kept == "fp8")
            ends = [made[0], made[-1]] if len(made) > 1 else made
            yield from ([name, kept, *capacity_cells(one, loops)] for one in ends)


def _limits(presets: Iterable[tuple[str, ModelConfig]]) -> Iterator[list[str]]:
    for name, model in presets:
        plain, blocks = (tensor_parallel(model, fp8=fp8, experts="divided") for fp8 in (False, True))
        cache = token_cache(model, model.mean_recurrence)
        yield [name, f"{model.mean_recurrence} / {model.max_loops}", str(cache.slots), f"{cache.kept:,}",
               f"{cache.expanded:,}", str(plain.largest), str(blocks.largest or "none"), blocks.limit]  # fmt: skip


def capacity_page(presets: Sequence[tuple[str, ModelConfig]]) -> str:
    """docs/capacity.md, from (name, model) of each preset."""
    limits = [
        "preset",
        "T / largest",
        "slots at T",
        "bytes per token at T",
        "expanded",
        "TP",
        "TP in fp8",
        "twice that",
    ]
    tables = "\n\n".join(
        f"### {gpu.name.upper()}, {byte_text(gpu.memory_bytes)}, {gpu.gpus_per_node} in a node\n\n"
        f"{markdown_table(HEADER, _rows(presets, gpu))}"
        for gpu in (GPUS["h200"], GPUS["h100"])
    )
    return f"""# How many GPUs serve a model, and how many tokens do they hold?

Generated by `tools/capacity.py --page` from `ds_configs/*.json`; a test keeps it current. For any configuration:
`mythos-ds capacity --config 100b.json --gpu h200 --gpus 16`; for a model folder: `--model FOLDER`. **Nothing here has
run on a GPU**: bytes of weights and cache are exact, what is beside them is assumed.

## What a folder allows

The cache has a slot per (loop, layer), in bfloat16. T is the mean of training, at which a server starts unless told
otherwise. "Expanded": where an engine keeps keys and values of each head and not the latents. TP is the largest
tensor-parallel size; in fp8 a rank's rows or columns of a matrix must be whole blocks of {FP8_BLOCK}, and the last
column names the matrix that stops twice as many ranks. `mythos-ds convert` prints this for each folder that it writes.

{markdown_table(limits, _limits(presets))}

Expert parallelism keeps experts whole, and helps where they are what stops fp8; here the shared experts, of the same
width, stop it too. A folder whose blocks do not fit can be dequantised while it is loaded, which takes the memory of
bfloat16, where the engine does that ([serving](serving.md#vllm)).

## GPUs, and tokens of cache

The smallest power of two of GPUs on which each replica has room for {LEAST_TOKENS:,} tokens at T loops. "Tensor x
data": tensor parallel inside a node, times replicas of attention; experts lie whole on all GPUs (the expert-parallel
size is that of all GPUs). Latents are on each tensor-parallel rank, so that more of these leave a replica hardly more
tokens; replicas each have a cache of their own, and matrices of attention and of dense and shared feed-forwards each.
Hence two rows where two divisions fit: the most and the least tensor parallel.

* Weights: the folder's tensors in the folder's types, on the fullest GPU; the vocabulary filled up to 64 rows; in fp8
  scales, and the bfloat16 copy of the matrix that latent attention absorbs.
* For the cache: {MEMORY_SHARE:.0%} of the GPU's memory (vLLM's default), less weights and {byte_text(RESERVE_BYTES)}
  for activations, CUDA graphs, communicators and the context. **Share and reserve are assumptions.** Prompts of many
  tokens in one step need more of them, on every GPU that experts' rows come to.
* "One replica": the longest sequence that fits, at T loops. "All": tokens of all sequences together, on servers at
  half of T, at T, and at the largest loop count of training.

{tables}

No row: no division fits (the first table says why). A request of fewer loops than its server has frees no slots.
"""
