"""The planner: presets fit what they name, costs agree with hand calculations, and what it writes runs."""

import json
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
import torch

from mythos_ds.config.loader import load_config
from mythos_ds.config.resolve import planned_world_size, resolve
from mythos_ds.config.schema import ModelConfig
from mythos_ds.costs.communicators import outside_bytes
from mythos_ds.costs.flops import flops_per_token
from mythos_ds.errors import ConfigError
from mythos_ds.hardware import GPUS, read_gpu
from mythos_ds.kernels.cross_entropy import chunk_rows
from mythos_ds.kernels.norm import rms_norm
from mythos_ds.kernels.regions import regions_called_by
from mythos_ds.mains import run_tool
from mythos_ds.model.parameter_roles import is_expert
from mythos_ds.plan import layouts
from mythos_ds.plan.activation_trace import Workload, coda_bytes, trace
from mythos_ds.plan.device_traffic import micro_batch
from mythos_ds.plan.layouts import candidates, examine, first_remedy, ranked, remedies, with_changes
from mythos_ds.plan.memory import held_elements, memory, parameter_shapes, reduce_bucket_bytes, states, workload
from mythos_ds.plan.moved_bytes import MovedBytes
from mythos_ds.plan.report import as_numbers, draw
from mythos_ds.plan.timing import EXCHANGE, checkpoint, costs, timing
from mythos_ds.plan.traffic import node_limit, traffic
from tests.helpers.mains import load_main
from tests.helpers.paths import ROOT
from tests.helpers.time_limit import at_most
from tests.helpers.toy_model import toy_model

PLAN = load_main("tools/plan.py")
PRESETS = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")


def plan_main(arguments: list[str]) -> int:
    """tools/plan.py's exit code."""
    return run_tool(PLAN.parser(), PLAN.work, arguments)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_the_cluster_it_names(name):
    config = load_config(name, []).config
    found = memory(resolve(config, planned_world_size(config)))
    assert config.cluster is not None
    assert found.total <= GPUS[config.cluster.gpu].memory_bytes
    assert found.total >= 0.2 * GPUS[config.cluster.gpu].memory_bytes, "a layout that leaves most of the GPU empty"


def test_the_largest_preset_does_not_fit_smaller_gpus_and_the_plan_says_what_helps():
    config = load_config("1t", []).config
    h100 = GPUS["h100"]
    layout = examine(config, 1024, h100, {})
    assert not layout.fits(h100)
    remedy = first_remedy(config, 1024, h100)
    assert remedy is not None
    assert remedy.fits(h100)
    assert any(remedy.changes.items() >= changes.items() for changes in remedies(config))
    numbers = as_numbers(layout, h100, 1e12, remedy, [])
    assert numbers["fits"] is False
    assert numbers["binding"] == "activations"
    assert numbers["remedy"] == remedy.changes
    json.dumps(numbers)


def openmythos_1t(shared_width: int) -> ModelConfig:
    """The one-trillion preset of OpenMythos."""
    return ModelConfig(
        vocab_size=100_000, dim=16384, prelude_layers=6, recurrent_layers=1, coda_layers=6, max_loops=64,
        mean_recurrence=64, attn_type="mla", n_heads=128, q_lora_rank=3072, kv_lora_rank=1024,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_dim=65536 // 3 * 2, n_experts=512,
        n_experts_per_tok=8, expert_dim=34560, n_shared_experts=8, shared_expert_dim=shared_width,
    )  # fmt: skip


@pytest.mark.parametrize(("shared_width", "teraflops"), [(8 * 34560, 47.3), (34560, 10.7)])
def test_the_cost_of_openmythos_agrees_with_the_hand_calculation(shared_width, teraflops):
    """6 (T P_loop + P_once) FLOPs per trained token, without attention scores: 47.3 TFLOP with shared experts as wide
    as OpenMythos makes them, 10.7 with narrow ones; 1,336 and 304 days per trillion tokens on 1,024 GPUs at 400
    TFLOP/s."""
    cost = flops_per_token(openmythos_1t(shared_width), context=1, n_loops=64)
    trained = 3 * cost.forward
    assert trained / 1e12 == pytest.approx(teraflops, rel=0.02)
    days = 1e12 * trained / (1024 * 400e12) / 86400
    assert days == pytest.approx({47.3: 1336, 10.7: 304}[teraflops], rel=0.02)


def test_states_are_counted_with_padding():
    shapes = (("a.weight", (5, 3)), ("recurrent.layers.0.moe.experts.w1", (4, 3, 1)))
    assert held_elements(shapes, 4, 2) == (4 + 3, 4 + 3)
    resolved = resolve(load_config("1t", []).config, 1024)
    kept = states(resolved)
    assert kept.masters == 2 * kept.weights == kept.gradients == kept.optimizer // 2
    assert kept.masters * 1024 / 4 == pytest.approx(992.5e9, rel=1e-3)


def test_a_longer_loop_costs_its_state_its_routing_and_no_more():
    """Of the routing that its recompute replays: a token's experts, the order of its rows here and where they arrive,
    with the inverses, and the counts."""
    model = toy_model()
    loads = [Workload(model, 2, 32, loops, 2, torch.bfloat16, "loop") for loops in (3, 4, 9)]
    three, four, nine = (trace(load).peak for load in loads)
    assert nine - four == 5 * (four - three)
    integers = 5 * 2 * 32 * model.n_experts_per_tok + model.n_experts
    kept = 2 * 32 * model.dim * 4 + model.recurrent_layers * integers * 8
    assert four - three == pytest.approx(kept, rel=0.1)
    everything = Workload(model, 2, 32, 9, 2, torch.bfloat16, "none")
    assert trace(everything).peak > 2 * nine


def test_what_fp32_gradients_take():
    """Of bf16 weights: two bytes more for each gathered one of the loop, and twice as much on the wire."""
    config = load_config("1b", ["parallel.ep_size=8", "parallel.activation_checkpointing=loop"]).config
    own, less = (
        resolve(with_changes(config, changes), 8)
        for changes in ({}, {"training.grad_dtype": "bfloat16", "deepspeed.communication_data_type": "bf16"})
    )
    assert (reduce_bucket_bytes(own), reduce_bucket_bytes(less)) == (2e9, 1e9)
    wide, narrow = traffic(own, 8), traffic(less, 8)
    assert (wide.reduce, wide.reduce_experts) == (2 * narrow.reduce, 2 * narrow.reduce_experts)
    assert (wide.gather, wide.exchange) == (narrow.gather, narrow.exchange)
    shapes = parameter_shapes(config.model)
    cut = {name: own.ep_size if is_expert(name) else 1 for name, _ in shapes}
    looped = sum(prod(shape) // cut[name] for name, shape in shapes if name.startswith("recurrent."))
    grown = trace(workload(own)).peak - trace(workload(less)).peak
    assert grown == pytest.approx(2 * looped, rel=0.1)


def test_context_and_communicators_are_by_formula_or_as_measured():
    config = load_config("1b", []).config
    assert config.cluster is not None
    measured = config.model_copy(update={"cluster": config.cluster.model_copy(update={"context_bytes": 7 * 10**9})})
    by_formula, given = ({i.name: i.bytes for i in memory(resolve(c, 8)).items} for c in (config, measured))
    assert by_formula["context"] + by_formula["communicators"] == pytest.approx(outside_bytes(resolve(config, 8)))
    assert given["context"] == 7e9
    assert "communicators" not in given


def test_operations_beside_products_take_time():
    """Longer than the products where layers are narrow, as in 1b; so the share of the peak is not of products alone."""
    config = load_config("1b", []).config
    step = timing(resolve(config, 8), GPUS["h100"])
    assert 1 < step.memory_s / step.compute_s < 6
    assert step.bound_s >= step.compute_s + step.memory_s
    bare = sum(transfer.seconds for transfer in step.transfers if transfer.name != EXCHANGE)
    assert step.built_s == pytest.approx(step.compute_s + step.memory_s + bare + step.waits_s)


def test_the_host_holds_a_step_up_where_it_launches_longer_than_the_device_works():
    """13,400 launches of a micro-batch of 1b at 8 loops, 4 with gradient, without documents (profiled by operation)."""
    config = load_config("1b", ["parallel.activation_checkpointing=loop", "training.compile=none"]).config
    found = micro_batch(workload(resolve(config, 8)), 8, 4)
    assert 9_000 < found.launches < 14_000
    quick, slow = (timing(resolve(config, 8), replace(GPUS["h100"], launch_s=seconds)) for seconds in (0.0, 1e-3))
    bare = sum(transfer.seconds for transfer in slow.transfers if transfer.name != EXCHANGE)
    assert quick.built_s == pytest.approx(quick.compute_s + quick.memory_s + bare + quick.waits_s)
    assert slow.launch_s > slow.compute_s + slow.memory_s
    assert slow.built_s == pytest.approx(slow.launch_s + bare + slow.waits_s)
    assert slow.bound_s >= slow.launch_s


def test_compiled_regions_read_and_write_once():
    """For a layer of 1b near what the inductor schedules, products and all (tests/cuda/test_launches.py): 60 launches
    forward, 141 backward with the recompute; as written 159 and 375."""
    config = load_config("1b", ["parallel.activation_checkpointing=loop"]).config
    layers, load = config.model.recurrent_layers, workload(resolve(config, 8))
    assert load.compiled, "the default of a GPU"
    forward, backward = [], []
    for compiled in (True, False):
        one, two, graded = (micro_batch(replace(load, compiled=compiled), *loops) for loops in ((2, 1), (3, 1), (3, 2)))
        forward.append((two + one * -1) * (1 / layers))
        backward.append((graded + two * -1) * (1 / layers))
    assert [found.launches for found in forward] == pytest.approx([60, 159], rel=0.15)
    assert [found.launches for found in backward] == pytest.approx([141, 375], rel=0.15)
    for found in (forward, backward):
        assert 0.3 <= found[0].token / found[1].token <= 0.5


def test_a_compiled_region_and_its_backward_are_a_kernel_each():
    x = torch.empty(100, 40, device="meta", requires_grad=True)
    gain = torch.empty(40, device="meta", requires_grad=True)
    moved = MovedBytes()
    with regions_called_by(moved.as_one_kernel), moved:
        y = rms_norm(x, gain, eps=1e-6)
        assert (moved.bytes, moved.launches) == (2 * 16_000 + 160, 1)
        y.backward(torch.empty_like(y))
    # Backward reads x, the gain and y's gradient, and writes x's and the gain's, for which it sums over rows.
    assert (moved.bytes, moved.launches) == (2 * 16_000 + 160 + 3 * 16_000 + 2 * 160, 3)
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_the_loss_takes_the_chunks_of_its_device():
    """A chunk adds to the head's gradient once; its logits take memory, but no two chunks' at once."""
    config = load_config("1b", []).config
    load = replace(workload(resolve(config, 8)), rows=1, seq_len=16_384)
    on_gpu, on_cpu = (coda_bytes(replace(load, on_gpu=on), (0,)) for on in (True, False))
    rows, vocab = chunk_rows(config.model.vocab_size, "cuda"), config.model.vocab_size
    assert rows * vocab <= 1 << 28 < (rows + 1) * vocab
    assert chunk_rows(vocab, "cpu") == 256
    held = 6 * vocab * (rows - 256)  # fp32 logits and their bf16 gradient
    assert 0.6 * held <= on_gpu - on_cpu <= held
    two, three = (micro_batch(replace(load, rows=n), 2, 1) for n in (2, 3))  # of two chunks each
    assert three.once - two.once == pytest.approx(2 * 2 * 4 * vocab * config.model.dim), "read and written"
    assert three.launches - two.launches == 2 * 21


def test_bytes_that_move_are_counted_by_operation():
    x = torch.empty(100, 40, device="meta", dtype=torch.bfloat16)
    weight, total = torch.empty(40, 40, device="meta", dtype=torch.bfloat16), torch.empty(100, 40, device="meta")
    with MovedBytes() as moved:
        y = (x @ weight).view(40, 100)  # a product and a view: nothing
        assert (moved.bytes, moved.launches) == (0, 1)
        (y.t() + x).float()  # read 2 x 8,000, write 8,000; read 8,000, write 16,000
        assert moved.bytes == 48_000
        total.add_(x.float())  # read 8,000, write 16,000; read 32,000, write 16,000
        assert (moved.bytes, moved.launches) == (48_000 + 72_000, 5)


def test_traffic_grows_with_loops_only_where_tokens_travel():
    config = load_config("10b", []).config
    resolved = resolve(config, planned_world_size(config))
    one, two = traffic(resolved, 8), traffic(resolved, 16)
    assert (one.gather, one.reduce, one.gather_experts) == (two.gather, two.reduce, two.gather_experts)
    assert 1.3 < two.exchange / one.exchange < 2.0


def test_node_limited_routing_saves_only_where_a_token_is_sent_once_to_a_node():
    config = load_config("1t", ["parallel.dispatch=all_to_all", "parallel.overlap=false"]).config
    config = with_changes(config, {"model.n_expert_groups": None, "model.n_limited_groups": None})
    found = node_limit(resolve(config, 1024), 8)
    nodes, used, experts = 32, config.model.n_experts_per_tok, config.model.n_experts
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4000, experts, generator=generator).topk(used).indices // (experts // nodes)
    away = drawn[drawn != 0].numel() / len(drawn)
    distinct = sum(len(set(row) - {0}) for row in drawn.tolist()) / len(drawn)
    assert found is not None
    assert found.nodes == nodes
    assert found.sent == found.one_per_expert == pytest.approx(away, rel=0.02)
    assert found.once_per_node == pytest.approx(distinct, rel=0.02)
    assert found.limited == pytest.approx(4 * 31 / 32)
    limited = {"model.n_expert_groups": 32, "model.n_limited_groups": 2}
    again = node_limit(resolve(with_changes(config, limited), 1024), 8)
    assert again is not None
    assert (again.limit, again.sent, again.limited) == (2, found.sent, pytest.approx(2 * 31 / 32))
    once = node_limit(resolve(with_changes(config, {**limited, "parallel.dispatch": "per_node"}), 1024), 8)
    assert once is not None
    assert (once.sent, once.once_per_node) == (once.limited, found.once_per_node)
    assert node_limit(resolve(load_config("1b", []).config, 8), 8) is None


def test_the_reach_of_a_pipeline_whose_ends_have_no_experts():
    stages = ["parallel.pp_size=[8,16,8]", "parallel.ep_size=16", "model.n_experts=32", "training.micro_batch_size=2"]
    for dispatch in ("all_to_all", "per_node"):
        settings = [*stages, "training.global_batch_size=96", f"parallel.dispatch={dispatch}"]
        zero = "deepspeed.zero_optimization.stage3_param_persistence_threshold=null"
        reach = node_limit(resolve(load_config("tiny", [*settings, zero]).config, 32), 8)
        assert reach is not None
        assert reach.sent == (reach.one_per_expert if dispatch == "all_to_all" else reach.once_per_node)


def test_costs_and_checkpoints_are_consistent():
    config = load_config("1t", []).config
    resolved, gpu = resolve(config, 1024), GPUS["h200"]
    step = timing(resolved, gpu)
    assert step.built_s > step.bound_s >= step.compute_s
    built, bound, *targets = costs(step, 1024, gpu, 15e12)
    assert [cost.label for cost in (built, bound, *targets)] == ["as built", "bound", "target 45%", "target 35%"]
    assert (built.mfu, bound.mfu) == (step.mfu_built, step.mfu_bound)
    assert built.dollars > bound.dollars
    for cost in (built, bound, *targets):
        assert cost.days == pytest.approx(15 * cost.days_per_trillion)
        assert cost.dollars == pytest.approx(cost.days * 24 * 1024 * gpu.price_per_hour)
    saved = checkpoint(resolved, 1024, gpu)
    assert saved.bytes == pytest.approx(12e12, rel=0.01)
    assert saved.hours_between_failures == pytest.approx(49.6, rel=0.01)


def test_a_gpu_from_a_file_and_what_is_wrong_with_one(tmp_path):
    path = tmp_path / "gpu.json"
    fields = {"name": "mine", "memory_bytes": 48e9, "peak_flops": 181e12, "kernel_share": 0.7}
    links = {"node_bandwidth": 32e9, "network_bandwidth": 12e9, "memory_bandwidth": 8.64e11}
    path.write_text(json.dumps({**fields, **links}))
    assert (read_gpu(str(path)).memory_bytes, read_gpu(str(path)).memory_bandwidth) == (48e9, 8.64e11)
    odd = {"peak_flops": -1}, {"memory_bytes": 1e400}, {"gpus_per_node": 2.5}, {"kernel_share": 75}, {"name": 5}
    wrong = [json.dumps({**fields, **links, **change}) for change in odd]
    for content in ('{"memory": 1}', "[]", "no json", *wrong):
        path.write_text(content)
        with pytest.raises(ConfigError, match="--gpu"):
            read_gpu(str(path))
    for name in links:
        path.write_text(json.dumps({**fields, **{key: value for key, value in links.items() if key != name}}))
        with pytest.raises(ConfigError, match=f"gpu.json: missing {name}; required: name, memory_bytes, .*{name}"):
            read_gpu(str(path))
    with pytest.raises(ConfigError, match="h100"):
        read_gpu("h999")


def test_the_command_writes_a_configuration_that_loads_and_a_picture(tmp_path, capsys):
    chosen, picture = tmp_path / "chosen.json", tmp_path / "plan.png"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config", "1b.json", "--json", "--compare"]
    command += ["--write", str(chosen), "--picture", str(picture), "--objective", "time", "--layouts", "2"]
    command += ["model.recurrent_layers=1", "model.prelude_layers=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert numbers["fits"] is True
    assert len(numbers["layouts"]) == 2
    first, second = numbers["layouts"]
    assert first["step_as_built_s"] / first["tokens_per_step"] <= second["step_as_built_s"] / second["tokens_per_step"]
    assert {row["model"] for row in numbers["comparison"]} >= {"looped, 8 loops", "looped, 16 loops"}
    written = load_config(str(chosen), []).config
    resolve(written, planned_world_size(written))
    assert picture.stat().st_size > 10_000
    stage_one = ["parallel.zero_stage=1"]
    for wrong in (stage_one, ["--tokens", "many"], ["--gpu", "h999"], ["--gpus", "0"]):
        code, refused = plan_main([*command[2:4], *wrong]), capsys.readouterr().err
        assert (code, refused.count("\n")) == (2, 1), refused


@pytest.mark.parametrize("option", ["--write", "--picture"])
def test_a_place_where_no_file_can_be_is_told_before_planning(option, tmp_path, capsys):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for place, said in ((folder, "a folder"), (tmp_path / "none" / "x.png", "its folder does not exist")):
        with at_most(5.0, option):
            code = plan_main(
                ["--config", "tiny.json", "--gpu", "h100", "--gpus", "1", "--objective", "time", option, str(place)]
            )
        refused = capsys.readouterr().err
        assert (code, refused.count("\n")) == (2, 1), refused
        assert f"{option}: given {place}" in refused
        assert said in refused


def test_experts_copies_on_many_nodes_and_rings_in_one_travel_where_they_lie():
    config = load_config("10b", []).config
    node = GPUS["h100"]

    def moved(changes, gpus):
        found = timing(resolve(with_changes(config, changes), gpus), node)
        return {transfer.name: transfer for transfer in found.transfers}

    for ep_size in (2, 4, 8, 16):
        resolved = resolve(with_changes(config, {"parallel.ep_size": ep_size}), 64)
        total = traffic(resolved, 4).gather_experts
        copies, near = 64 // ep_size, max(1, 8 // ep_size)
        found = moved({"parallel.ep_size": ep_size}, 64)["gather experts"]
        assert found.network_bytes == pytest.approx(total * (1 - near / copies) / near), ep_size
        assert (found.node_bytes > 0) == (near > 1)
    ring = {"parallel.pp_size": 2, "parallel.ep_size": 4, "training.global_batch_size": 512}
    assert moved(ring, 8)["ring"].network_bytes == 0 < moved(ring, 8)["ring"].node_bytes
    assert moved(ring, 64)["ring"].node_bytes == 0 < moved(ring, 64)["ring"].network_bytes


def test_optimizer_state_in_host_memory_takes_time_and_no_room():
    config = load_config("10b", []).config
    changes = ({"parallel.offload_optimizer": kept} for kept in ("none", "cpu"))
    with_it, without = (examine(config, 64, GPUS["h100"], change) for change in changes)
    assert without.memory.total < with_it.memory.total
    moved = states(with_it.resolved).gradients + states(with_it.resolved).weights
    h100 = GPUS["h100"]
    updated_here = 2 * states(with_it.resolved).total / (h100.memory_bandwidth * h100.memory_share)
    expected = moved / h100.host_bandwidth - updated_here
    assert without.timing.built_s - with_it.timing.built_s == pytest.approx(expected)


def test_what_is_written_names_the_machines_that_were_asked_for(tmp_path, capsys):
    command = ["--config", "1b.json", "--write", str(tmp_path / "w.json")]
    own = {"name": "mine", "memory_bytes": 141e9, "peak_flops": 9e14, "kernel_share": 0.7}
    links = {"node_bandwidth": 4e11, "network_bandwidth": 5e10, "memory_bandwidth": 4.8e12}
    (tmp_path / "g.json").write_text(json.dumps({**own, **links}))
    cases = (
        (["--gpus", "4", "--gpu", "h200", "parallel.ep_size=4"], ("h200", 1, 4)),
        (["cluster.nodes=4", "cluster.gpus_per_node=2", "parallel.ep_size=2"], ("h100", 4, 2)),
        (["--gpus", "16", "--gpu", str(tmp_path / "g.json")], (str(tmp_path / "g.json"), 2, 8)),
    )
    for more, (gpu, nodes, per_node) in cases:
        assert plan_main([*command, *more]) == 0, capsys.readouterr().err
        cluster = json.loads((tmp_path / "w.json").read_text())["cluster"]
        assert cluster == {"gpu": gpu, "nodes": nodes, "gpus_per_node": per_node}
    code = plan_main([*command[:2], "--picture", str(tmp_path / "x.foo")])
    assert (code, "ends in .png" in capsys.readouterr().err) == (2, True)


def test_layouts_are_tried_with_less_where_none_fits(monkeypatch):
    config, gpu = load_config("10b", []).config, GPUS["h100"]
    rows, looked_at = config.training.micro_batch_size, list(candidates(config, 64, gpu))
    tried = {(c["training.micro_batch_size"], c["parallel.activation_checkpointing"]) for c in looked_at}
    assert tried == {(n, kept) for n in {max(1, rows // 2), rows, 2 * rows} for kept in ("layer", "loop", "none")}
    one = {
        "training.micro_batch_size": rows,
        "parallel.activation_checkpointing": "loop",
        "parallel.dispatch": "all_to_all",
        "parallel.overlap": False,
    }
    monkeypatch.setattr(layouts, "candidates", lambda *_: [one])
    least = examine(config, 64, gpu, one)
    assert ranked([config], 64, gpu, "time", most=1)[0][0].changes == one
    small = replace(gpu, memory_bytes=least.memory.total - 1)
    ((found,),) = ranked([config], 64, small, "time", most=1)
    assert found.changes == {**one, "parallel.offload_optimizer": "cpu"}
    smaller = replace(gpu, memory_bytes=found.memory.total - 1)
    ((last,),) = ranked([config], 64, smaller, "time", most=1)
    assert set(last.changes) == {*found.changes, "training.mean_backprop_depth"}


def test_a_run_with_bf16_sums_may_become_a_pipeline_and_others_may_get_them():
    config, gpu = load_config("50b", ["training.grad_dtype=bfloat16"]).config, GPUS["h100"]
    looked_at = [changes for changes in candidates(config, 256, gpu) if changes["parallel.pp_size"] == 2]
    changed = with_changes(config, {**looked_at[0], "training.global_batch_size": 1024})
    assert len(resolve(changed, 256).stages) == 2
    assert any(changes.get("training.grad_dtype") == "float32" for changes in remedies(config))
    plain = with_changes(config, {"training.grad_dtype": "float32"})
    assert list(remedies(plain))[-1] == {"training.grad_dtype": "bfloat16"}
    assert all("training.grad_dtype" not in changes for changes in candidates(plain, 256, gpu))


def test_the_picture_shows_a_plan_that_does_not_fit(tmp_path):
    config = load_config("10b", []).config
    small = GPUS["h100"]
    layout = examine(config, 64, small, {"training.micro_batch_size": 4})
    draw("10b", as_numbers(layout, small, 1e12, None, []), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
