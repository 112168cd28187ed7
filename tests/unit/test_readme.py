"""The README's blocks say where they run, and no two of its runs share a directory."""

import shlex

import pytest

from mythos_ds.config.loader import load_config
from mythos_ds.train.run_directory import default_run_directory
from tests.helpers.paths import ROOT
from tests.helpers.readme import (
    CLUSTER,
    INSTALL,
    LAPTOP,
    OUTPUT,
    README,
    TUTORIAL,
    Command,
    fenced_blocks,
    marked_blocks,
)

TEXT = """Text.

```sh laptop
make it      # a comment

run one \\
  --more     # of it
```

```text output
it
```

```sh cluster
far away
```

```python laptop
name = "it"  # a comment
print(name)
```

```console laptop
$ say yes '#1'
yes
$ say no  # nothing
```
"""


def test_blocks_and_their_commands():
    blocks = fenced_blocks(TEXT)
    assert [block.kind for block in blocks] == [LAPTOP, OUTPUT, CLUSTER, LAPTOP, LAPTOP]
    assert [block.line for block in blocks] == [3, 10, 14, 18, 23]
    assert [one.text.split() for one in blocks[0].commands()] == [["make", "it"], ["run", "one", "--more"]]
    assert blocks[1].lines == ("it",)
    script = 'name = "it"  # a comment\nprint(name)'
    assert blocks[3].commands() == [Command(f"python - <<'END'\n{script}\nEND")]
    assert blocks[4].commands() == [Command("say yes '#1'", ("yes",)), Command("say no", ())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n```\nmake\n```\n", "line 2: a block marked ''; allowed: "),
        ("```sh\nmake\n```\n", "line 1: a block marked 'sh'"),
        ("```sh laptop\nmake\n```\n\n~~~sh desktop\nmake\n~~~\n", "line 5: a block marked 'sh desktop'"),
        ("  ```\n  make\n  ```\n", "line 1: a block marked ''"),
        ("\n```sh laptop\nmake\n", "line 2: this block never ends"),
    ],
)
def test_an_unmarked_block_is_refused(text, message):
    with pytest.raises(ValueError, match="line") as caught:
        fenced_blocks(text)
    assert str(caught.value).startswith(message)


def test_output_without_a_command_is_refused():
    block = fenced_blocks("```console laptop\nyes\n$ say yes\n```")[0]
    with pytest.raises(ValueError, match="line 1: a console block begins with a command"):
        block.commands()


def test_every_block_of_the_readme_is_marked():
    blocks = fenced_blocks(README.read_text())
    assert {block.kind for block in blocks} == {LAPTOP, CLUSTER, OUTPUT}
    assert all(block.commands() for block in blocks if block.kind != OUTPUT)


def test_no_two_runs_of_the_readme_share_a_directory():
    """Those that are given none and are no plan: each a proxy or a layout of its own."""
    chosen = []
    for block in fenced_blocks(README.read_text()):
        for command in block.commands() if block.kind != OUTPUT else ():
            words = shlex.split(command.text)
            if not {"pretrain", "launch/pretrain.py"} & set(words) or {"--run-dir", "--dry-run"} & set(words):
                continue
            if any(line.startswith("error:") for line in command.prints):
                continue
            config, overrides = words[words.index("--config") + 1], [word for word in words if "=" in word]
            option = "--num_gpus" if "--num_gpus" in words else "--processes"
            processes = int(words[words.index(option) + 1]) if "--proxy" in words else None
            chosen.append(default_run_directory(load_config(config, overrides), processes))
    assert len(chosen) >= 3
    assert len(set(chosen)) == len(chosen), chosen


def test_the_readme_installs_what_make_does():
    commands = [
        one.text for block in fenced_blocks(README.read_text()) if block.kind == LAPTOP for one in block.commands()
    ]
    assert [text for text in commands if text.startswith("pip")] == list(INSTALL)
    assert f"TORCH ?= {INSTALL[0].split()[-1]}\n" in (ROOT / "Makefile").read_text()


def test_marked_blocks_of_a_page():
    unmarked = "text\n```python\ntwo\n```\n```\nthree\n```\n"
    page = f"<!-- laptop -->\n```sh\none\n```\n{unmarked}<!-- cluster -->\n```sh\nfour\n```\n"
    assert [(block.kind, block.line, block.lines) for block in marked_blocks(page)] == [
        (LAPTOP, 2, ("one",)),
        (CLUSTER, 13, ("four",)),
    ]
    for wrong, message in (
        ("<!-- desktop -->\n", "line 1: <!-- desktop --> given"),
        ("<!-- laptop -->\ntext\n", "line 2: no"),
    ):
        with pytest.raises(ValueError, match="line") as caught:
            marked_blocks(wrong)
        assert str(caught.value).startswith(message)


def test_the_tutorial_runs_what_it_shows():
    blocks = marked_blocks(TUTORIAL.read_text())
    assert {block.kind for block in blocks} == {LAPTOP, CLUSTER}
    assert len(blocks) >= 6
