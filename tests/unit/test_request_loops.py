"""What requests to a server may say of their loops; these rules need no vLLM."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mythos_vllm import loop_admission
from mythos_vllm.request_loops import (
    EXPERIMENTAL,
    LoopServer,
    check_request,
    experimental_option,
    obstacles,
    requested_loops,
    salted,
)

FOUR = LoopServer(4)
ABLE: dict[str, Any] = {
    "second_runner": False, "experimental": False, "own_worker": True, "worker": "a.Worker", "graphs": False,
    "data_parallel": 1, "microbatches": False, "speculative": False, "connector": False,
}  # fmt: skip


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_a_count_up_to_the_servers_is_taken(loops: int) -> None:
    assert requested_loops({"n_loops": loops, "session_id": "a"}, FOUR) == loops
    check_request("/v1/completions", {"prompt": "a", "vllm_xargs": {"n_loops": loops}}, FOUR)


@pytest.mark.parametrize("arguments", [None, {}, {"kv_transfer_params": {"a": 1}}])
def test_without_a_count_the_servers_loops_run_whatever_it_cannot_do(arguments) -> None:
    assert requested_loops(arguments, LoopServer(4, ("it is an obstacle",))) == 4


@pytest.mark.parametrize(
    ("given", "nearest"),
    [(0, 1), (-3, 1), (5, 4), (10**400, 4), ("two", None), ("2", 2), (2.5, 2), (3.0, 3), (True, None), (False, None),
     (None, None), ([2], None), (float("nan"), None), (float("inf"), None)],
)  # fmt: skip
def test_another_count_is_refused_with_the_nearest_one(given, nearest) -> None:
    for check in (
        lambda: requested_loops({"n_loops": given}, FOUR),
        lambda: check_request("/v1/completions", {"vllm_xargs": {"n_loops": given}}, FOUR),
    ):
        with pytest.raises(ValueError) as caught:
            check()
        expected = f"vllm_xargs.n_loops: given {given!r:.60}; allowed: a whole number from 1 to 4, the server's loops"
        assert str(caught.value) == expected + ("" if nearest is None else f"; nearest: {nearest}")


def test_an_argument_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vllm_xargs: given 'n_loop', .*did you mean 'n_loops'\?"):
        requested_loops({"n_loop": 2}, FOUR)
    with pytest.raises(ValueError, match=r"given 'zebra'.*session_id$"):
        requested_loops({"zebra": 2, "n_loops": 2}, FOUR)
    assert requested_loops({"zebra": 2, "n_loops": 2}, LoopServer(4, (), logits_processors=True)) == 2


def test_what_vllm_would_drop_is_refused() -> None:
    with pytest.raises(ValueError, match=r'n_loops: given as a field .* "vllm_xargs": \{"n_loops": 4\}'):
        check_request("/v1/completions", {"n_loops": 2}, FOUR)
    with pytest.raises(ValueError, match="given to /v1/embeddings, which drops it; allowed: /v1/completions"):
        check_request("/v1/embeddings", {"vllm_xargs": {"n_loops": 2}}, FOUR)
    with pytest.raises(ValueError, match="given with use_beam_search"):
        check_request("/v1/completions", {"vllm_xargs": {"n_loops": 2}, "use_beam_search": True}, FOUR)
    for body in ([1], "n_loops", {"vllm_xargs": None}, {"vllm_xargs": [1]}, {"prompt": "n_loops"}):
        check_request("/v1/completions", body, FOUR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second_runner": True, "own_worker": False}, f"{EXPERIMENTAL}.*VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"own_worker": False}, "worker is a.Worker; .*--worker-cls"),
        ({"graphs": True}, "allowed: --enforce-eager"),
        ({"data_parallel": 2}, "--data-parallel-size 2.*allowed: 1"),
        ({"microbatches": True}, "--enable-dbo"),
        ({"speculative": True}, "--speculative-config"),
        ({"connector": True}, "--kv-transfer-config"),
    ],
)
def test_a_server_that_cannot_says_what_it_would_take(change, message) -> None:
    found = obstacles(**{**ABLE, **change})
    assert len(found) == 1
    with pytest.raises(ValueError, match=f"^vllm_xargs.n_loops: given 4, but on this server .*{message}"):
        requested_loops({"n_loops": 4}, LoopServer(4, found))


def test_what_hinders_nothing() -> None:
    assert obstacles(**ABLE) == ()
    assert obstacles(**{**ABLE, "second_runner": True, "experimental": True, "own_worker": False}) == ()


def test_the_experimental_option_is_true_or_false_and_for_the_second_runner() -> None:
    assert experimental_option({EXPERIMENTAL: True}, True) is True
    assert not any(experimental_option(given, False) for given in ({}, None, object(), {EXPERIMENTAL: False}))
    with pytest.raises(ValueError, match="given 'yes'; allowed: true, false"):
        experimental_option({EXPERIMENTAL: "yes"}, True)
    with pytest.raises(ValueError, match="this server has the first"):
        experimental_option({EXPERIMENTAL: True}, False)


@pytest.mark.parametrize("last", [b"b}", b'"n_loops": 1}}', b"n_loops {"])
def test_what_is_in_order_passes_the_guard_as_it_was_sent(last: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_admission, "loop_server", lambda config: FOUR)
    sent = [
        {"type": "http.request", "body": b'{"vllm_xargs": {', "more_body": True},
        {"type": "http.request", "body": last, "more_body": False},
        {"type": "http.disconnect"},
    ]
    left, seen = list(sent), []

    async def receive() -> Any:
        return left.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive() for _ in sent])

    client = SimpleNamespace(vllm_config=None)
    state = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": state}
    asyncio.run(loop_admission.LoopGuard(app)(scope, receive, None))
    assert seen == sent


def test_salts_of_other_depths_differ_whatever_users_bring() -> None:
    own = [None, "", "1", "2", "1;", "2;1", ";2", "12"]
    salts = [salted(salt, loops) for salt in own for loops in (1, 2, 12)]
    assert len(set(salts)) == len(salts)
