"""Why the pipeline does what it does: with one safeguard taken away at a time the results are wrong, mostly without an
error. Where a test here fails because a safeguard became needless, it can go."""

import ast
import hashlib
import inspect
import sys

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from mythos_ds.engine.deepspeed_patches import require_checked_version
from mythos_ds.errors import ParallelError
from mythos_ds.parallel.pipeline_executor import require_torch
from tests.distributed.cases import GLOBAL_BATCH, LOOPS, SEQ_LEN, toy_model
from tests.helpers.distributed import RankFailedError, run_distributed

MODULE = "tests.distributed.pipeline_cases"
TIMEOUT_S = 300.0
HANG_S = 45.0
RIGHT, WRONG = 1e-6, 1e-5
COUNTED = [
    float(loops * GLOBAL_BATCH * SEQ_LEN * toy_model().n_experts_per_tok * toy_model().recurrent_layers)
    for loops in LOOPS
]
"""Choices of experts in each step of all layers, loops and tokens."""

REPLACED = {
    (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"): "177f236f119d2da8bdb9fa8bcd96f8ab",
    (DeepSpeedZeRoOffload, "destroy"): "7096caaab8d6570b2bc17c73bf359f39",
    (DeepSpeedZeRoOffload, "_remove_module_hooks"): "a392edf8c50862c5c3dbba24a5fce910",
    (DeepSpeedEngine, "coalesce_grad_reduction"): "4122a34065573621ee2b9076e6a71b79",
    (DeepSpeedEngine, "_flush_coalesced_reduction_zero3"): "801db59712bb81af6504aedc1ce59a04",
}
"""What is replaced or relied upon inside DeepSpeed 0.19.8: SHA-256 of its source without comments, first half."""


def _digest(owner: type, name: str) -> str:
    tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    (own,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    (method,) = (node for node in own.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return hashlib.sha256(ast.unparse(method).encode()).hexdigest()[:32]


@pytest.fixture(scope="module")
def found():
    """`pipeline_cases.guards` on four ranks."""
    return run_distributed(f"{MODULE}:guards", 4, TIMEOUT_S)[0]


def test_as_it_is(found):
    assert max(found["as it is"][name] for name in ("loss", "norm", "weight", "buffer")) <= RIGHT
    assert found["as it is"]["counted"] == COUNTED


def test_layers_have_one_number_in_the_whole_model(found):
    """A sum over all ranks by the layer's number within its stage mixes the loads of different layers."""
    wrong = found["layers numbered within the stage"]
    assert wrong["counted"] == COUNTED, "nothing looks wrong"
    assert wrong["buffer"] > WRONG
    assert wrong["loss"] > WRONG


def test_recomputation_is_not_counted(found):
    assert found["counters in the forward"]["counted"] == COUNTED
    recomputed = found["counters in the forward, records left open"]["counted"]
    assert all(more > right for more, right in zip(recomputed, COUNTED, strict=True))


def test_the_gradient_norm_is_that_of_all_stages(found):
    wrong = found["without the norm over stages"]
    assert wrong["norm"] > WRONG
    assert wrong["weight"] > WRONG


def test_gradients_are_reduced_once():
    """DeepSpeed's own hooks reduce in the middle of the schedule, and fail over what the next visit adds."""
    with pytest.raises(RankFailedError, match=r"stage3\.py"):
        run_distributed(f"{MODULE}:without_coalescing", 4, TIMEOUT_S)


@pytest.mark.slow
def test_module_hooks_wait_for_other_stages_for_ever():
    with pytest.raises(RankFailedError, match="did not end within"):
        run_distributed(f"{MODULE}:with_module_hooks", 4, HANG_S)


@pytest.mark.parametrize(("owner", "name"), REPLACED)
def test_deepspeed_did_not_change_beneath(owner, name):
    """Where this fails: check the pipeline on the new DeepSpeed (all of tests/distributed), then note the new digest
    and extend `deepspeed_patches.CHECKED`."""
    assert _digest(owner, name) == REPLACED[owner, name]


def test_the_replaced_norm_is_still_what_a_step_reads():
    module = inspect.getsource(sys.modules[DeepSpeedZeroOptimizer_Stage3.__module__])
    assert "norm_groups = self._get_norm_groups()\n            scaled_global_grad_norm = combine_" in module


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0", "0.20.0+local"])
def test_unchecked_versions_are_refused(version):
    with pytest.raises(ParallelError, match=r"allowed: 0\.19\.8 up to, not including, 0\.20\.0; nearest: 0\.19\.8"):
        require_checked_version(version)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.11+cu130"])
def test_checked_versions_are_not(version):
    require_checked_version(version)


def test_old_torch_is_refused():
    with pytest.raises(ParallelError, match=r"needs torch >= 2\.9, this is 2\.8\.1\+cu128"):
        require_torch("2.8.1+cu128")
    for version in ("2.9.0", "2.13.0+cpu", "3.0.1"):
        require_torch(version)
