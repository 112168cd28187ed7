"""Relative paths that are not there: the message says in which folder they were looked for; absolute ones need none."""

from pathlib import Path

import pytest

from mythos_ds.cluster.hostfile import read_hostfile
from mythos_ds.cluster.preflight.host_facts import _data_problems
from mythos_ds.config.loader import find_config
from mythos_ds.config.schema import DataConfig
from mythos_ds.conversion.merge import newest_tag
from mythos_ds.conversion.starting_weights import foreign_section
from mythos_ds.data.builtin import existing_builtin
from mythos_ds.data.dataset_info import read_info
from mythos_ds.data.inputs import find_inputs
from mythos_ds.data.tokenizer import Tokenizer
from mythos_ds.errors import MythosError
from mythos_ds.io import read_bytes, where_searched
from mythos_ds.train.resume import _refuse_other
from mythos_ds.weights.built_in import find_model
from tests.helpers.mains import load_main

READERS = {
    "configuration": lambda path: find_config(str(path)),
    "dataset": read_info,
    "tokenizer": Tokenizer.load,
    "input of prepare-data": lambda path: find_inputs([path]),
    "built-in corpus": existing_builtin,
    "model": find_model,
    "checkpoint": newest_tag,
    "resume": _refuse_other,
    "starting weights": lambda path: foreign_section(path, {}),
    "hostfile": read_hostfile,
    "any JSON": read_bytes,
}
NAMES = ("nothing", "some/folder/nothing", "../nothing", "./nothing", "nothing.json", "with space/é", "no/where.model")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_relative_path_says_where_it_was_looked_for(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MythosError) as caught:
        READERS[kind](Path(name))
    assert str(caught.value).count(f"(looked for in {tmp_path})") == 1
    assert Path(name).name in str(caught.value)
    with pytest.raises(MythosError) as caught:
        READERS[kind](tmp_path / name)
    assert "looked for in" not in str(caught.value)


def test_preflight_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig.model_validate(
        {"datasets": [{"prefix": "a/train"}], "validation": "a/valid", "tokenizer": "a/tokenizer.model"}
    )
    problems = _data_problems(data)
    assert len(problems) == 3
    assert all(f"(looked for in {tmp_path})" in problem for problem in problems)


@pytest.mark.parametrize(
    "command",
    [
        ["merge_checkpoint", "nothing", "--output", "out"],
        ["average_checkpoints", "nothing", "nothing-else", "--output", "out"],
        ["inspect_data", "nothing"],
        ["verify_checkpoint", "nothing"],
        ["generate", "x", "--model", "nothing"],
    ],
    ids=lambda command: command[0],
)
def test_tools_name_the_folder(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    tool = load_main(f"tools/{command[0]}.py")
    code = tool.main(command[1:]) if hasattr(tool, "main") else tool.run_tool(tool.parser(), tool.work, command[1:])
    assert code == 2
    assert f"(looked for in {tmp_path})" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert where_searched("data/x") == " (looked for in a folder that is gone)"
    assert where_searched("/data/x") == ""
