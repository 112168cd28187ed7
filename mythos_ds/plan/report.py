"""A plan as numbers with units, as tables, and as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mythos_ds.config.resolve import ResolvedRun
from mythos_ds.costs.evaluation import evaluation_share
from mythos_ds.costs.flops import expected_flops_per_token, flops_per_token, mean_training_depth
from mythos_ds.costs.params import count_parameters
from mythos_ds.formatting import byte_text, dollar_text, number_text
from mythos_ds.hardware import Gpu
from mythos_ds.plan.layouts import Layout
from mythos_ds.plan.slots import HOTTEST
from mythos_ds.plan.timing import EXCHANGE, checkpoint, costs, serving
from mythos_ds.plan.traffic import node_limit


def as_numbers(layout: Layout, gpu: Gpu, tokens: float, remedy: Layout | None, others: list[Layout]) -> dict[str, Any]:
    """Everything the plan says, names ending in their unit."""
    resolved, step = layout.resolved, layout.timing
    world = resolved.world_size
    return {
        "gpus": world,
        "gpu": gpu.name,
        "fits": layout.fits(gpu),
        "binding": layout.memory.largest.name if not layout.fits(gpu) else reasons(layout)[0],
        "remedy": None if remedy is None else remedy.changes,
        "parameters": parameters(resolved),
        "flops": flops(resolved),
        "memory_bytes": {item.name: item.bytes for item in layout.memory.items},
        "memory_total_bytes": layout.memory.total,
        "memory_limit_bytes": gpu.memory_bytes,
        "transfers": [
            {"name": t.name, "node_bytes": t.node_bytes, "network_bytes": t.network_bytes, "seconds": t.seconds}
            for t in step.transfers
        ],
        "compute_s": step.compute_s,
        "memory_bound_s": step.memory_s,
        "launch_s": step.launch_s,
        "assumptions": {name: value for name, value in vars(gpu).items() if name != "name"},
        "dispatch": resolved.config.parallel.dispatch,
        "row_waits_s": step.waits_s,
        "pipeline_idle_share": step.idle_share,
        "step_bound_s": step.bound_s,
        "step_as_built_s": step.built_s,
        "mfu_bound": step.mfu_bound,
        "mfu_as_built": step.mfu_built,
        "step_hottest_rank_s": step.hottest_s,
        "mfu_hottest_rank": step.mfu_hottest,
        "evaluation_share": evaluation_share(resolved),
        "reasons": reasons(layout),
        "costs": [
            {
                "at": cost.label, "mfu": cost.mfu, "tokens_per_s": cost.tokens_per_second, "days": cost.days,
                "days_per_trillion_tokens": cost.days_per_trillion, "dollars": cost.dollars,
            }
            for cost in costs(step, world, gpu, tokens)
        ],
        "node_limited_routing": None if (reach := node_limit(resolved, gpu.gpus_per_node)) is None else vars(reach),
        "checkpoint": vars(checkpoint(resolved, world, gpu)),
        "serving": vars(serving(resolved, gpu)),
        "layouts": [
            {
                "changes": other.changes, "memory_total_bytes": other.memory.total,
                "step_as_built_s": other.timing.built_s, "mfu_as_built": other.timing.mfu_built,
                "mfu_bound": other.timing.mfu_bound, "tokens_per_step": other.timing.tokens_per_step,
            }
            for other in others
        ],
    }  # fmt: skip


def parameters(resolved: ResolvedRun) -> dict[str, Any]:
    """Counts by part."""
    counts = count_parameters(resolved.config.model)
    return {**vars(counts), "total": counts.total, "active_share": counts.active_share}


def flops(resolved: ResolvedRun) -> dict[str, float]:
    """FLOPs of one token."""
    config = resolved.config
    model, length = config.model, config.training.seq_len
    mean = expected_flops_per_token(config, resolved.mean_backprop_depth, resolved.grows_from)
    full = flops_per_token(model, context=length, n_loops=model.max_loops)
    return {
        "mean_loops": mean_training_depth(config, resolved.grows_from),
        "max_loops": model.max_loops,
        "training_flops_per_token": mean.training,
        "recompute_flops_per_token": mean.recompute,
        "training_at_full_depth_flops_per_token": full.training,
        "serving_at_full_depth_flops_per_token": full.forward + full.attention,
        "serving_to_trained_forward": (full.forward + full.attention) / (mean.forward + mean.attention),
        "attention_share_at_full_depth": full.attention / (full.forward + full.attention),
    }


def reasons(layout: Layout) -> list[str]:
    """What keeps the step from the peak, the costliest first."""
    step = layout.timing
    kernel = step.model_flops / step.peak_flops
    recompute = 1 - kernel / (step.compute_s * _kernel_share(layout))
    lost = {
        "matrix products reach less than the peak": step.compute_s * (1 - _kernel_share(layout)),
        "operations beside products wait for memory": step.memory_s,
        "the host launches operations": max(0.0, step.launch_s - step.compute_s - step.memory_s),
        "loops are computed again in backward": step.compute_s * _kernel_share(layout) * recompute,
        f"{EXCHANGE} is not hidden behind computation": step.waits_s,
        **{f"{t.name} is not hidden behind computation": t.seconds for t in step.transfers if t.name != EXCHANGE},
        "the pipeline idles": step.built_s * step.idle_share,
    }
    return [name for name, seconds in sorted(lost.items(), key=lambda entry: -entry[1]) if seconds > 0]


def _kernel_share(layout: Layout) -> float:
    step = layout.timing
    run = layout.resolved
    cost = expected_flops_per_token(run.config, run.mean_backprop_depth, run.grows_from)
    done = step.model_flops * (cost.training + cost.recompute) / cost.training
    return done / (step.compute_s * step.peak_flops)


def print_run(console: Console, name: str, numbers: dict[str, Any]) -> None:
    """The plan of a run for people; of training stages first what they come to together, then each."""
    if "stages" not in numbers:
        print_plan(console, name, numbers)
        return
    parts, fits = numbers["stages"], numbers["fits"]
    too_large = ", ".join(part["name"] for part in parts if not part["fits"])
    verdict = "[green]fits[/green]" if fits else f"[red]does not fit[/red] in {too_large}"
    size, limit = byte_text(numbers["memory_total_bytes"]), byte_text(numbers["memory_limit_bytes"])
    machines = f"{numbers['gpus']:,} {numbers['gpu']}, {len(parts)} training stages"
    most = f"at most {size} of {limit} per GPU, in {numbers['binding_stage']}"
    console.print(f"[bold]{name}[/bold] on {machines}: {verdict}: {most}", highlight=False)
    if not fits:
        _print_remedy(console, numbers)
    console.print(_stage_table(numbers))
    console.print(_sum_table(numbers))
    for number, part in enumerate(parts, 1):
        console.print()
        print_plan(console, f"training stage {number} of {len(parts)}: {part['name']}", part, first=parts[0])
    if numbers["layouts"]:
        console.print(_run_layout_table(numbers))


def _print_remedy(console: Console, numbers: dict[str, Any]) -> None:
    console.print(f"  binds: {numbers['binding']}", highlight=False)
    change = numbers["remedy"]
    text = " ".join(f"{key}={value}" for key, value in change.items()) if change else "no single change is enough"
    console.print(f"  first change that makes it fit: {text}", highlight=False)


def print_plan(console: Console, name: str, numbers: dict[str, Any], first: dict[str, Any] | None = None) -> None:
    """The plan of one training stage, or of a run without, for people. first: that of the run's first stage, of which
    nothing is said twice."""
    fits, total, limit = numbers["fits"], numbers["memory_total_bytes"], numbers["memory_limit_bytes"]
    verdict = "[green]fits[/green]" if fits else "[red]does not fit[/red]"
    console.print(f"[bold]{name}[/bold] on {numbers['gpus']:,} {numbers['gpu']}: {verdict}: "
                  f"{byte_text(total)} of {byte_text(limit)} per GPU", highlight=False)  # fmt: skip
    if not fits and "remedy" in numbers:
        _print_remedy(console, numbers)
    same = []
    for part, (keys, shown) in _PARTS.items():
        if first is not None and first is not numbers and all(first[key] == numbers[key] for key in keys):
            same.append(part)
        elif made := shown(numbers):
            console.print(made, highlight=False)
    if same:
        console.print(f"as in stage {first['name'] if first else ''}: {', '.join(same)}", highlight=False)
    if numbers.get("layouts"):
        console.print(_layout_table(numbers))


def _counted_text(numbers: dict[str, Any]) -> str:
    counted, cost = numbers["parameters"], numbers["flops"]
    return (
        f"parameters {counted['total']:,}, active {counted['active']:,} ({counted['active_share']:.1%}); "
        f"{cost['training_flops_per_token'] / 1e9:,.4g} GFLOP per trained token at {cost['mean_loops']:.1f} loops, "
        f"{cost['training_at_full_depth_flops_per_token'] / 1e9:,.4g} at {cost['max_loops']}; serving at full depth "
        f"costs {cost['serving_to_trained_forward']:.1f} times the forward of a trained token"
    )


def _saved_text(numbers: dict[str, Any]) -> str:
    saved, served = numbers["checkpoint"], numbers["serving"]
    return (
        f"checkpoint {byte_text(saved['bytes'])}, {saved['write_s']:.0f} s to write; a failure every "
        f"{saved['hours_between_failures']:,.0f} hours: save every {saved['interval_s'] / 60:.0f} minutes\n"
        f"serving: {served['nodes']} node(s); cache {byte_text(served['cache_bytes_mean'])} per token at mean depth, "
        f"{byte_text(served['cache_bytes_max'])} at full depth; there {served['largest_context']:,} tokens in all, or "
        f"{served['batch_at_training_length']} sequences of the training length"
    )


def _reach_text(numbers: dict[str, Any]) -> str | None:
    reach = numbers["node_limited_routing"]
    return reach and (
        f'expert groups span {reach["nodes"]} nodes: by parallel.dispatch "{reach["dispatch"]}" {reach["sent"]:.3g} '
        f'copies of a token leave its node for each looped layer; by "all_to_all" {reach["one_per_expert"]:.3g}, one '
        f'per expert, by "per_node" {reach["once_per_node"]:.3g}, and {reach["limited"]:.3g} with routing limited to '
        f"{reach['limit']} nodes (model.n_expert_groups={reach['nodes']}, n_limited_groups={reach['limit']})"
    )


def _stage_table(numbers: dict[str, Any]) -> Table:
    """Memory and length of each training stage, and the days and dollars of each and of all, as built."""
    heads = ("stage", "memory", "sequence", "steps", "tokens", "days", "dollars")
    made = _table("Training stages", *heads)
    at = numbers["costs"][0]["at"]
    for part in (*numbers["stages"], {**numbers, "name": "all"}):
        cost = next(one for one in part["costs"] if one["at"] == at)
        length = str(part["seq_len"]) if "seq_len" in part else ""
        size = byte_text(part["memory_total_bytes"]) + ("" if part["fits"] else " does not fit")
        cells = (size, length, f"{part['steps']:,}", number_text(part["tokens"]))
        made.add_row(part["name"], *cells, f"{cost['days']:,.1f}", dollar_text(cost["dollars"]))
    made.caption = f"days and dollars {at}"
    return made


def _sum_table(numbers: dict[str, Any]) -> Table:
    """What all training stages cost together, at each utilisation that all of them allow."""
    made = _table("Cost of all stages", "at", "days", "dollars")
    for cost in numbers["costs"]:
        made.add_row(cost["at"], f"{cost['days']:,.1f}", dollar_text(cost["dollars"]))
    return made


def _run_layout_table(numbers: dict[str, Any]) -> Table:
    made = _table("Layouts that fit every training stage", "changes", "memory", "days as built")
    for other in numbers["layouts"]:
        changes = " ".join(f"{key}={value}" for key, value in other["changes"].items())
        made.add_row(changes, byte_text(other["memory_total_bytes"]), f"{other['days_as_built']:,.1f}")
    return made


def _table(title: str, *headings: str) -> Table:
    made = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")  # never cut
    return made


def _memory_table(numbers: dict[str, Any]) -> Table:
    made = _table("Memory of the fullest GPU", "item", "bytes", "share")
    for name, size in sorted(numbers["memory_bytes"].items(), key=lambda entry: -entry[1]):
        made.add_row(name, byte_text(size), f"{size / numbers['memory_total_bytes']:.0%}")
    return made


def _step_table(numbers: dict[str, Any]) -> Table:
    made = _table("A mean step of one GPU", "what", "in the node", "to other nodes", "seconds alone")
    made.add_row("matrix products and attention", "", "", f"{numbers['compute_s']:.3g}")
    made.add_row("memory-bound operations", "", "", f"{numbers['memory_bound_s']:.3g}")
    made.add_row("launches by the host, beside these", "", "", f"{numbers['launch_s']:.3g}")
    for moved in numbers["transfers"]:
        cells = (byte_text(moved["node_bytes"]), byte_text(moved["network_bytes"]), f"{moved['seconds']:.3g}")
        made.add_row(moved["name"], *cells)
    made.add_row("waits for rows, of dispatch and combine", "", "", f"{numbers['row_waits_s']:.3g}")
    made.add_row("step, all hidden", "", "", f"{numbers['step_bound_s']:.3g}")
    made.add_row("step as built, only rows hidden", "", "", f"{numbers['step_as_built_s']:.3g}")
    lost, uneven = "; ".join(numbers["reasons"][:4]), ""
    if numbers["mfu_hottest_rank"] is not None and numbers["row_waits_s"]:
        uneven = f", {numbers['mfu_hottest_rank']:.0%} where the hottest rank has {HOTTEST} times the mean of rows"
    made.caption = (
        f"MFU at most {numbers['mfu_bound']:.0%}, as built {numbers['mfu_as_built']:.0%}{uneven}; lost to: {lost}"
    )
    return made


def _assumptions_text(numbers: dict[str, Any]) -> str:
    gpu = numbers["assumptions"]
    return (
        f"assumed: products reach {gpu['kernel_share']:.0%} of {gpu['peak_flops'] / 1e12:,.0f} TFLOP/s, other "
        f"operations {gpu['memory_share']:.0%} of {gpu['memory_bandwidth'] / 1e12:.3g} TB/s, a compiled region "
        "(training.compile) reading its inputs and writing its results once; a launch "
        f"takes the host {gpu['launch_s'] * 1e6:.3g} us, one for each operation or region; links reach "
        f"{gpu['node_bandwidth'] / 1e9:,.0f} GB/s in the node, {gpu['network_bandwidth'] / 1e9:,.0f} to others, "
        f"{gpu['host_bandwidth'] / 1e9:,.0f} to host memory; experts are loaded evenly" + _deepep_text(numbers)
    )


def _deepep_text(numbers: dict[str, Any]) -> str:
    if numbers["dispatch"] != "deepep":
        return ""
    return '; "deepep", which has never run, sends and computes what "per_rank" or "per_node" does, without its buffer'


def _evaluation_text(numbers: dict[str, Any]) -> str:
    return (
        f"evaluations: {numbers['evaluation_share']:.1%} of the FLOPs (training.eval_interval, eval_batches, "
        "eval_deep_every), not in the costs above"
    )


def _cost_table(numbers: dict[str, Any]) -> Table:
    title = "Cost of the training stage" if "name" in numbers else "Cost of the run"
    made = _table(title, "at", "tokens/s", "days", "days per trillion tokens", "dollars")
    for cost in numbers["costs"]:
        cells = (f"{cost['tokens_per_s']:,.0f}", f"{cost['days']:,.1f}", f"{cost['days_per_trillion_tokens']:,.1f}")
        share = "" if cost["at"].endswith("%") else f" ({cost['mfu']:.0%})"
        made.add_row(f"{cost['at']}{share}", *cells, dollar_text(cost["dollars"]))
    return made


_STEP_KEYS = (
    "transfers",
    "row_waits_s",
    "compute_s",
    "memory_bound_s",
    "step_bound_s",
    "step_as_built_s",
    "mfu_bound",
    "reasons",
)
_PARTS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Table | str | None]]] = {
    "parameters": (("parameters", "flops"), _counted_text),
    "memory": (("memory_bytes",), _memory_table),
    "a mean step": (_STEP_KEYS, _step_table),
    "assumptions": (("assumptions",), _assumptions_text),
    "cost": (("costs",), _cost_table),
    "evaluations": (("evaluation_share",), _evaluation_text),
    "checkpoint and serving": (("checkpoint", "serving"), _saved_text),
    "expert groups": (("node_limited_routing",), _reach_text),
}
"""What a plan tells, in this order: the numbers that each part shows, and how."""


def _layout_table(numbers: dict[str, Any]) -> Table:
    made = _table("Layouts that fit", "changes", "memory", "MFU as built", "MFU at most")
    for other in numbers["layouts"]:
        changes = " ".join(f"{key.split('.')[1]}={value}" for key, value in other["changes"].items())
        cells = (byte_text(other["memory_total_bytes"]), f"{other['mfu_as_built']:.1%}", f"{other['mfu_bound']:.1%}")
        made.add_row(changes, *cells)
    return made


def draw(name: str, numbers: dict[str, Any], path: Path) -> None:
    """Memory as a stack against the device's, and the step as a bar of what takes time."""
    from matplotlib.figure import Figure

    stages = numbers.get("stages", [numbers])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names: list[str] = []

    def look(part: str) -> dict[str, str]:
        """One colour for a part, and one line of the legend."""
        label = "" if part in names else part
        names.append(part)
        return {"color": f"C{list(dict.fromkeys(names)).index(part) % 10}", "label": label}

    for number, stage in enumerate(stages):
        bottom = 0.0
        for item, size in stage["memory_bytes"].items():
            left.bar([number], [size / 1e9], bottom=bottom, width=0.5, **look(item))
            bottom += size / 1e9
    left.axhline(numbers["memory_limit_bytes"] / 1e9, color="black", linestyle="--", label="device")
    shown = [stage["name"] for stage in stages if "name" in stage]
    left.set(xlim=(-0.5, len(stages) + 1.2), ylabel="GB per GPU", title=f"{name}: memory")
    left.set_xticks(range(len(shown)), shown)
    left.legend(fontsize="x-small", loc="upper right")
    names.clear()
    for number, stage in enumerate(stages):
        start = 0.0
        own = {"products and attention": stage["compute_s"], "memory-bound": stage["memory_bound_s"]}
        bare = {t["name"]: t["seconds"] for t in stage["transfers"] if t["name"] != EXCHANGE}
        parts = {**own, "waits for rows": stage["row_waits_s"], **bare}
        for part, seconds in parts.items():
            right.barh([number], [seconds], left=start, height=0.4, **look(part))
            start += seconds
        hidden = "" if number else "all hidden"
        right.vlines(stage["step_bound_s"], number - 0.4, number + 0.4, color="black", linestyle="--", label=hidden)
    right.set(ylim=(-0.5, len(stages) + 0.5), xlabel="seconds per step", title="a mean step as built, only rows hidden")
    right.set_yticks(range(len(shown)), shown)
    right.legend(fontsize="x-small", loc="upper left")
    figure.savefig(path, dpi=110)
