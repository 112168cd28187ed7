"""Studies that train arms of the small language model and compare their losses: loops, cost, attention, balancing."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mythos_ds.analysis import routing
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.flops import cache_bytes_per_token
from mythos_ds.lab.spec import Arm, RunSpec
from mythos_ds.lab.studies import language
from mythos_ds.lab.studies.language import BASELINE, MEAN, configuration, loss_at, unlooped
from mythos_ds.lab.study import Report, Results, Study, spread
from mythos_ds.lab.trained_models import measured
from mythos_ds.model.attention import Attention
from mythos_ds.model.mythos import MythosModel

LOOPS_ARMS = [
    BASELINE,
    Arm("poisson", "Poisson depth", {"training.depth_distribution": "poisson"}),
    Arm("uniform", "uniform depth (1 to 7)", {"training.depth_distribution": "uniform"}),
    Arm("fixed", "fixed depth", {"training.depth_distribution": "fixed", "model.max_loops": MEAN}),
    Arm("sequence", "a depth per sequence", {"training.depth_per": "sequence"}),
    Arm("curriculum", "mean depth grows over the first half", {"training.depth_curriculum_steps": 150}),
    Arm("full_gradient", "gradient through all loops", {"training.mean_backprop_depth": 12}),
    Arm("last_gradient", "gradient through the last loop", {"training.mean_backprop_depth": 1}),
    Arm("act", "ACT", {"model.halting": "act", "training.ponder_cost": 1e-3}),
    Arm("streams_2", "2 residual streams mixed per loop", control="streams_2"),
    Arm("post", "injection after the layers", {"model.injection": "post"}),
    Arm("zoh", "zero-order hold for B", {"model.discretisation": "zoh"}),
    Arm("embedding", "loop embedding", {"model.loop_embedding": "scaled"}),
    Arm("lora", "loop embedding and LoRA (rank 4)", {"model.loop_embedding": "scaled", "model.lora_rank": 4}),
    Arm("lora_16", "loop embedding and LoRA (rank 16)", {"model.loop_embedding": "scaled", "model.lora_rank": 16}),
    Arm("h0", "h_0 = e instead of zeros", {"model.initial_state": "embedding"}),
    Arm("no_prelude_norm", "no norm on e", {"model.prelude_norm": False}),
    Arm("no_qk_norm", "no norm on queries and keys", {"model.qk_norm": False}),
]
_DRAWN = ("looped", "fixed", "curriculum", "sequence", "full_gradient", "post", "streams_2", "zoh")

COST_ARMS = [
    BASELINE,
    Arm("one_layer", "1 distinct MoE layer (equal parameters)", unlooped(1)),
    Arm("four_layers", "4 distinct MoE layers (equal forward FLOPs)", unlooped(MEAN)),
    Arm("four_layers_steps", "the same, steps cut to equal training FLOPs", unlooped(MEAN)),
]

_MLA = {
    "model.attn_type": "mla", "model.n_kv_heads": None, "model.qk_norm": False, "model.kv_lora_rank": 24,
    "model.qk_nope_head_dim": 12, "model.qk_rope_head_dim": 8, "model.v_head_dim": 16,
}  # fmt: skip
ATTENTION_ARMS = [Arm("looped", "GQA, 2 of 4 key/value heads"), Arm("mla", "MLA, latent 24 + 8", _MLA)]

_AUXILIARY = {"training.router_bias_rate": 0.0, "training.balance_loss": 1e-2}
BALANCING_ARMS = [
    Arm("looped", "bias shared by all loops and a slower one per loop"),
    Arm("shared_bias", "shared bias only", control="shared_bias"),
    Arm("loop_bias", "bias per loop only", control="loop_bias"),
    Arm("auxiliary", "no bias, balance loss 1e-2", _AUXILIARY),
    Arm("unbalanced", "no balancing", {"training.router_bias_rate": 0.0, "training.balance_loss": 0.0}),
]

Analyse = Callable[[Results, Mapping[tuple[str, int], Path], str], Report]


def _comparison(arms: Sequence[Arm], caption: str, picture: str, drawn: Sequence[str] = ()) -> Analyse:
    """An analysis that is a table of losses and a picture of loss against depth."""

    def analyse(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
        shown = [arm for arm in arms if not drawn or arm.name in drawn]
        return Report(
            language.numbers(results, arms),
            [(caption, language.table(results, arms, arms[0].name))],
            [(picture, lambda path: language.draw_depth(results, shown, path))],
        )

    return analyse


def _runs(arms: Sequence[Arm], *, equal_flops: bool = False) -> Callable[[str, str], dict[tuple[str, int], RunSpec]]:
    return lambda scale, data_dir: language.runs(arms, scale, data_dir, equal_flops=equal_flops)


def _analyse_loops(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    analyse = _comparison(LOOPS_ARMS, "Held-out loss at equal training FLOPs", "loops.png", _DRAWN)
    report = analyse(results, folders, scale)
    report.tables.append(("Fits of L(T) = L_inf + Z exp(-z T)", language.depth_fits(results, LOOPS_ARMS)))
    return report


def _analyse_cost(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Adds the share of the gap between one layer and four that looping closes, seed by seed."""
    report = _comparison(COST_ARMS, "Looping against distinct layers", "cost.png")(results, folders, scale)
    seeds = sorted({seed for arm, seed in results if arm == "looped"})
    rows = [["against four distinct layers", "gap (nats)", "closed by looping", "perplexity of looped / four"]]
    for name, label in (("four_layers", "same tokens"), ("four_layers_steps", "equal training FLOPs")):
        one, four, looped = (
            [loss_at(results[arm, seed], MEAN) for seed in seeds] for arm in ("one_layer", name, "looped")
        )
        gaps = [a - b for a, b in zip(one, four, strict=True)]
        closed = [100 * (a - c) / gap for a, c, gap in zip(one, looped, gaps, strict=True)]
        ratio = [math.exp(c - b) for b, c in zip(four, looped, strict=True)]
        rows.append([label, spread(gaps, 4), f"{spread(closed, 0)} %", spread(ratio, 4)])
        report.numbers[f"closed_percent/{name}"] = closed
    report.tables.append(("Share of the gap that looping closes", rows))
    return report


def measured_cache_bytes(model: ModelConfig, n_loops: int) -> float:
    """Bytes per token, at two bytes a value, of the keys and values (or latents) that attentions return."""
    values: list[int] = []

    def note(module: Any, inputs: Any, outputs: Any) -> None:
        entry = outputs[1]
        values.append(sum(getattr(entry, field.name)[0, 0].numel() for field in fields(entry)))

    built = MythosModel(model)
    for module in built.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(note)
    with torch.no_grad():
        built(torch.zeros(1, 4, dtype=torch.int64), n_loops=n_loops)
    return 2.0 * sum(values)


def _analyse_attention(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    report = _comparison(ATTENTION_ARMS, "MLA against GQA", "attention.png")(results, folders, scale)
    rows = [["arm", f"cache bytes per token at T = {MEAN}, formula", "measured", "at T = 16, formula", "measured"]]
    for arm in ATTENTION_ARMS:
        model = configuration({**language.base(scale), **arm.overrides}).model
        cells = [
            f"{value:,.0f}"
            for loops in (MEAN, 16)
            for value in (cache_bytes_per_token(model, loops), measured_cache_bytes(model, loops))
        ]
        rows.append([arm.label, *cells])
        report.numbers[f"cache/{arm.name}"] = cells
    report.tables.append(("Cache", rows))
    return report


def _analyse_routing(results: Results, folders: Mapping[tuple[str, int], Path], scale: str) -> Report:
    """Losses, and what the trainer noted of the routers at the last step."""
    report = _comparison(BALANCING_ARMS, "Balancing", "balancing.png")(results, folders, scale)
    rows = [["arm", "load max/mean over all loops", "worst loop", "overlap of loops 1 and 2",
             "largest share before bias", "entropy (nats)"]]  # fmt: skip
    for arm in BALANCING_ARMS:
        notes = [result["last"] for result in language.finished(results, arm.name)]
        rows.append([
            arm.label,
            spread([note["router/load_max_mean"] for note in notes], 2),
            spread([max(note["router/load_max_mean_per_loop"]) for note in notes], 2),
            spread([note["router/overlap_per_loop"][0] for note in notes if note["router/overlap_per_loop"]], 2),
            spread([max(note["router/prebias_max_share_per_loop"]) for note in notes], 3),
            spread([sum(n := note["router/entropy_per_loop"]) / len(n) for note in notes], 2),
        ])  # fmt: skip
        report.numbers[f"last_step/{arm.name}"] = notes
    report.tables.append(("Routers at the last training step", rows))
    found = measured(results, folders, BALANCING_ARMS, routing.measure)
    report.tables.append((f"Loops 1 to {MEAN} of the trained models on held-out text", _overlaps(found)))
    report.numbers |= {f"measured/{name}": own for name, own in found.items()}
    first = {arm.label: found[arm.name][0] for arm in BALANCING_ARMS if arm.name in found}
    report.pictures.append(("routing.png", lambda path: routing.draw(first, path)))
    return report


def _overlaps(found: Mapping[str, list[dict[str, Any]]]) -> list[list[str]]:
    """How far a token's experts in the first loop are those of the last, and how they are used."""
    rows = [["arm", "overlap of loops 1 and T", "with another token", "random sets", "same experts in 1 and T (%)",
             "no common expert (%)", "dead experts, worst loop", "entropy of mean (nats)",
             "load moved by bias"]]  # fmt: skip
    for arm in BALANCING_ARMS:
        layers = [own["layers"][0] for own in found.get(arm.name, [])]
        rows.append([
            arm.label,
            *(spread([layer[name][0][-1] for layer in layers], 2)
              for name in ("overlap", "overlap_other_token", "overlap_random")),
            spread([100 * layer["same_set"] for layer in layers], 0),
            spread([100 * layer["disjoint_set"] for layer in layers], 0),
            spread([max(layer["dead_experts"]) for layer in layers], 1),
            spread([layer["entropy_of_mean"][-1] for layer in layers], 2),
            spread([layer["moved_by_bias"][-1] for layer in layers], 2),
        ])  # fmt: skip
    return rows


LOOPS = Study(
    "loops",
    "What depth does the model need, and how should it be trained?",
    _runs(LOOPS_ARMS, equal_flops=True),
    _analyse_loops,
)
COST = Study("cost", "What does looping buy against distinct layers?", lambda scale, data_dir: {
    **language.runs(COST_ARMS[:3], scale, data_dir),
    **language.runs(COST_ARMS[3:], scale, data_dir, equal_flops=True),
}, _analyse_cost)  # fmt: skip
ATTENTION = Study("attention", "MLA or GQA?", _runs(ATTENTION_ARMS), _analyse_attention)
ROUTING = Study("routing", "How is a router that runs in every loop balanced, and do loops choose different experts?",
                _runs(BALANCING_ARMS), _analyse_routing)  # fmt: skip
