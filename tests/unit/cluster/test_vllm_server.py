"""The commands that serve a folder on vLLM. That vLLM reads them as they are meant is tests/optional/vllm_launch.py."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mythos_ds
from mythos_ds.cluster.vllm_server import OVERRIDES, OWN_FLAGS, VllmServer, widest
from mythos_ds.config.loader import load_config
from mythos_ds.errors import OptionError
from tests.helpers.mains import load_main
from tests.helpers.pretrain import ROOT

serve_vllm = load_main("launch/serve_vllm.py")
NODES = ["--nodes", "2", "--gpus", "4", "--tensor", "2", "--address", "node0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny (4 heads, 16 experts) as an exported folder."""
    output = tmp_path_factory.mktemp("served") / "tiny"
    mythos_ds.convert("tiny", output)
    return output


def _main(arguments: list[object]) -> int:
    code: int = serve_vllm.run_tool(serve_vllm.parser(), serve_vllm.work, [str(word) for word in arguments])
    return code


def _commands(capsys: pytest.CaptureFixture[str], arguments: list[object]) -> list[list[str]]:
    """The words of each command of a dry run."""
    assert _main([*arguments[:1], "--dry-run", *arguments[1:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("# node") for line in lines[::2])
    return [shlex.split(line) for line in lines[1::2]]


def _values(words: list[str]) -> dict[str, str]:
    """Flags and what follows them; "" where that is another flag."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word: "" if following.startswith("--") else following for word, following in pairs if word.startswith("--")}


def test_one_gpu_needs_no_flag_and_answers_this_machine_only(folder, capsys) -> None:
    assert _commands(capsys, [folder]) == [["vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", "8000"]]


def test_a_node_is_tensor_parallel_as_far_as_the_folder_allows(folder, capsys) -> None:
    (words,) = _commands(capsys, [folder, "--gpus", 8])
    found = _values(words)
    assert (found["--tensor-parallel-size"], found["--data-parallel-size"]) == ("4", "2"), "4 heads"
    assert "--enable-expert-parallel" in found
    assert "--data-parallel-address" not in found
    (words,) = _commands(capsys, [folder, "--gpus", 2, "--experts", "divided"])
    assert "--enable-expert-parallel" not in words


def test_nodes_are_started_by_one_line_each(folder, capsys) -> None:
    further = ["--max-model-len", "256"]
    first, second = _commands(capsys, [folder, *NODES, "--loops", 8, "--rpc-port", 29_600, "--", *further])
    assert all(words[-2:] == further for words in (first, second))
    one, two = _values(first), _values(second)
    shared = {
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "4",
        "--data-parallel-size-local": "2",
        "--data-parallel-address": "node0",
        "--data-parallel-rpc-port": "29600",
        "--enable-expert-parallel": "",
        OVERRIDES: '{"n_loops": 8}',
        "--max-model-len": "256",
    }
    assert one == {**shared, "--host": "127.0.0.1", "--port": "8000"}, (
        "node 0 answers, the others do not listen for requests"
    )
    assert two == {**shared, "--headless": "", "--data-parallel-start-rank": "2"}
    assert _commands(capsys, [folder, *NODES, "--node", 1, "--loops", 8, "--rpc-port", 29_600, "--", *further]) == [
        second
    ]


def test_replicas_of_all_nodes_are_numbered_through() -> None:
    server = VllmServer("f", nodes=4, gpus=8, tensor=2, address="node0")
    server.check()
    starts = [int(_values(server.command(node))["--data-parallel-start-rank"]) for node in (1, 2, 3)]
    assert starts == [4, 8, 12]
    assert _values(server.command(0))["--data-parallel-size"] == "16"


def test_every_flag_of_ours_is_one_that_nobody_else_may_give() -> None:
    server = VllmServer("f", nodes=2, gpus=4, tensor=2, address="node0", n_loops=3)
    flags = {word for node in (0, 1) for word in server.command(node) if word.startswith("--")}
    assert flags <= OWN_FLAGS | {OVERRIDES}
    for flag in sorted(
        OWN_FLAGS | {OVERRIDES, "--tensor_parallel_size", "--tensor-par", "--hf-overrides.n_loops", "--port=1"}
    ):
        with pytest.raises(OptionError, match="given after --"):
            VllmServer("f", gpus=4, n_loops=3, further=(flag, "2")).check()
    VllmServer("f", gpus=4, further=(OVERRIDES, "{}")).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: given 0; allowed: 1 or more; nearest: 1"),
        (["--gpus", "8", "--tensor", "3"], "--tensor: given 3; allowed: divisors of a node's 8 GPUs"),
        (["--gpus", "8", "--tensor", "8"], "--tensor: given 8; allowed: 1, 2, 4 (4 attention heads of"),
        (["--gpus", "32"], "--nodes 1 --gpus 32: given; allowed: at most 16 GPUs"),
        (["--gpus", "4", "--tensor", "1", "--experts", "divided", "--loops", "0"], "--loops: given 0"),
        (["--experts", "divided"], "--experts: given divided for one GPU"),
        (["--nodes", "2"], "--address: missing; needed for 2 nodes"),
        (["--nodes", "2", "--address", "127.0.0.1"], "--address: given 127.0.0.1; allowed: a name or address"),
        (["--address", "node0"], "--address: given for one node"),
        (["--rpc-port", "29600"], "--rpc-port: given for one node"),
        (["--port", "70000"], "--port: given 70000; allowed: 1 to 65535; nearest: 65535"),
        ([*NODES, "--port", "29550"], "--port: given 29550, where the nodes meet"),
        ([*NODES, "--node", "2"], "--node: given 2; allowed: 0 to 1; nearest: 1"),
        (["--", "--data-parallel-size", "4"], "--data-parallel-size: given after --"),
    ],
)
def test_wrong_input_is_one_message(folder, arguments, message, capsys) -> None:
    assert _main([folder, "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_which_node_this_is_must_be_said(folder, capsys) -> None:
    assert _main([folder, *NODES]) == 2
    assert "--node: missing; needed for 2 nodes: 0 to 1" in capsys.readouterr().err


def test_a_folder_of_another_kind_is_refused(tmp_path, capsys) -> None:
    assert _main([tmp_path, "--dry-run"]) == 2
    assert "no config.json; allowed: a folder that `mythos-ds convert --to hf` wrote" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert _main([tmp_path, "--dry-run"]) == 2
    assert "model_type 'llama'" in capsys.readouterr().err


def test_blocks_of_an_fp8_folder_are_checked_unless_it_is_overridden(tmp_path, capsys) -> None:
    mythos_ds.convert("tiny", tmp_path / "fp8", dtype="fp8")
    assert _main([tmp_path / "fp8", "--gpus", "2", "--dry-run"]) == 2
    assert "no whole fp8 blocks of 128" in capsys.readouterr().err
    override = ["--", OVERRIDES, '{"quantization_config": {"quant_method": "fp8", "dequantize": true}}']
    (words,) = _commands(capsys, [tmp_path / "fp8", "--gpus", 2, *override])
    assert words[-1] == override[-1]
    assert _values(words)["--tensor-parallel-size"] == "2"


@pytest.mark.parametrize(("name", "size"), [("50b", 1), ("100b", 8), ("1t", 8)])
def test_the_widest_tensor_parallel_size_is_that_of_the_capacity_table(name, size) -> None:
    model = load_config(f"{name}.json").config.model
    server = VllmServer("f", nodes=2, gpus=8, address="node0")
    assert widest(model, server, fp8=True) == size


def test_vllm_gets_the_words(folder, tmp_path) -> None:
    """With a program of that name in the path; what it prints are its arguments."""
    program = tmp_path / "vllm"
    program.write_text(f'#!{sys.executable}\nimport sys\nprint("GOT", *sys.argv[1:])\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "launch" / "serve_vllm.py"), str(folder), "--host", "0.0.0.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"GOT serve {folder} --host 0.0.0.0 --port 8000" in done.stdout
    assert "answers everybody who reaches it" in done.stderr
