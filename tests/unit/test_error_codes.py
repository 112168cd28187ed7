"""Codes of errors: each class and each rule has one of its own, all are explained, and each is printed once."""

import ast
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from mythos_ds import errors
from mythos_ds.error_codes import CODES, SUBJECTS, troubleshooting_page
from mythos_ds.errors import CheckpointError, Coded, ConfigError, MythosError, NumericsError, RankError
from mythos_ds.guard import told
from tests.helpers.paths import ROOT

REGISTRY = ROOT / "mythos_ds" / "error_codes.py"
FILES = sorted(
    path for folder in ("mythos_ds", "launch", "tools") for path in (ROOT / folder).rglob("*.py") if path != REGISTRY
)
RULES = sorted((ROOT / "mythos_ds" / "config").rglob("*.py"))
CODE = re.compile(r"MDS\d{3}")
COMMONEST = 40
PARTS_OF_RULES = {"scaling_problem"}
"""What a rule calls that has the code, and conversions too."""
OWN_CODE = ("coded", "_no_effect", "_needed")
"""What gives a code to one rule, or to a row of them."""
RULE = """
def depth(config: RunConfig) -> str | None:
    return None
"""


def error_classes(texts: list[str]) -> dict[str, str | None]:
    """The code in the body of each class that is a MythosError, by name; None where it has none."""
    classes = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    known = {"MythosError"}
    while True:
        more = {node.name for node in classes if {base.id for base in node.bases if isinstance(base, ast.Name)} & known}
        if more <= known:
            break
        known |= more
    return {node.name: _code_of(node) for node in classes if node.name in known}


def _code_of(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "code":
            return str(ast.literal_eval(statement.value))
    return None


def uncoded_rules(text: str) -> list[str]:
    """Functions that return a message or None and have no `@coded`."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "str | None":
            coded = any(ast.unparse(decorator).startswith("coded(") for decorator in node.decorator_list)
            found += [] if coded or node.name in PARTS_OF_RULES else [node.name]
    return found


def codes_of_rules(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in OWN_CODE and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def twice(codes: list[str]) -> list[str]:
    return [code for code, count in Counter(codes).items() if count > 1]


def test_every_class_of_errors_has_a_code_of_its_own():
    found = error_classes([path.read_text() for path in FILES])
    assert len(found) >= 15
    assert [name for name, code in found.items() if code is None] == []
    assert twice([str(code) for code in found.values()]) == []
    assert error_classes(["class MythosError(Exception):\n    code = 'MDS000'", "class New(MythosError): pass"]) == {
        "MythosError": "MDS000",
        "New": None,
    }


def test_every_rule_has_a_code_of_its_own():
    assert [name for path in RULES if path.parent.name == "rules" for name in uncoded_rules(path.read_text())] == []
    codes = [code for path in RULES for code in codes_of_rules(path.read_text())]
    assert len(codes) > 50
    assert twice(codes) == []
    assert uncoded_rules(RULE) == ["depth"]
    assert uncoded_rules(f'@coded("MDS299"){RULE}') == []
    assert twice([*codes, codes[0]]) == [codes[0]]


def test_the_codes_in_use_are_those_that_are_explained():
    used = {code for path in FILES for code in CODE.findall(path.read_text())}
    assert used - set(CODES) == set(), "not in mythos_ds/error_codes.py"
    assert set(CODES) - used == set(), "used nowhere"


def test_the_register_is_in_order():
    tree = ast.parse(REGISTRY.read_text())
    (written,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CODES" and isinstance(node.value, ast.Dict)
    ]
    keys = [ast.literal_eval(key) for key in written.keys if key is not None]
    assert keys == sorted(set(keys))
    assert all(CODE.fullmatch(key) and key[3] in SUBJECTS for key in keys)
    assert twice([about.title for about in CODES.values()]) == []
    assert all(about.title and not about.title.endswith(".") and "|" not in about.title for about in CODES.values())
    assert all(bool(about.cause) == bool(about.cure) for about in CODES.values())
    assert sum(1 for about in CODES.values() if about.cure) >= COMMONEST


def test_the_page_has_every_code_and_its_links_lead_somewhere():
    page = troubleshooting_page()
    anchors = {heading.lower() for heading in re.findall(r"^### (MDS\d{3})$", page, re.M)}
    assert len(anchors) >= COMMONEST
    assert set(re.findall(r"\(#(mds\d{3})\)", page)) == anchors
    rows = re.findall(r"^\| \[?(MDS\d{3})", page, re.M)
    assert sorted(rows) == sorted(CODES)


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (ConfigError("x: 3 given"), "x: 3 given [MDS100]"),
        (ConfigError([Coded("MDS101", "a: b"), Coded("MDS103", "c: d")]), "a: b [MDS101]\nc: d [MDS103]"),
        (CheckpointError("head:\n  a\n  b", code="MDS504"), "head: [MDS504]\n  a\n  b"),
        (NumericsError("loss is nan", loss=1.0, code="MDS801"), "loss is nan [MDS801]"),
        (RankError(ConfigError([Coded("MDS101", "a"), Coded("MDS102", "b")]).problems), "a [MDS101]\nb [MDS102]"),
        (MythosError(Coded("MDS243", "ep").after("at: ")), "at: ep [MDS243]"),
    ],
)
def test_a_report_has_a_code_for_each_problem(error, report, capsys):
    assert error.report() == report
    assert str(error) == CODE.sub("", report).replace(" []", "")
    assert error.code == CODE.findall(report)[0]
    again = pickle.loads(pickle.dumps(error))  # as between processes that read data
    assert (again.report(), again.code, again.problems) == (report, error.code, error.problems)
    assert told(error, "error") == 2
    assert capsys.readouterr().err == f"error: {report}\n"


def test_a_place_that_is_put_before_keeps_the_code():
    with pytest.raises(CheckpointError) as caught, errors.naming("folder"):
        raise errors.TensorMismatchError("a.weight: missing")
    assert caught.value.report() == "folder: a.weight: missing [MDS510]"
    assert isinstance(caught.value, errors.TensorMismatchError)


def test_faults_and_errors_of_the_system_have_codes(capsys, tmp_path):
    assert told(RuntimeError("x"), "error", tmp_path) == 1
    assert CODE.findall(capsys.readouterr().err) == ["MDS001"]
    assert told(PermissionError(13, "Permission denied", "a"), "error") == 2
    assert capsys.readouterr().err == "error: a: permission denied [MDS002]\n"
    assert told(MemoryError(), "error") == 2
    assert CODE.findall(capsys.readouterr().err) == ["MDS003"]


def test_a_command_prints_a_code_for_each_problem():
    """And does not read the register for it."""
    program = (
        "import sys; from mythos_ds.__main__ import main; sys.argv[0] = 'mythos-ds'\n"
        "try:\n"
        "    main(['pretrain', '--config', 'tiny.json', '--dry-run', 'model.n_expert=8', 'training.lr=-1',\n"
        "          'training.micro_batch_size=7'])\n"
        "finally:\n"
        "    sys.stdout.write(str('mythos_ds.error_codes' in sys.modules)); sys.stdout.flush()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = done.stderr.splitlines()
    assert [CODE.findall(line) for line in lines] == [["MDS101"], ["MDS103"], ["MDS229"]], done.stderr
    assert all(line.endswith("]") for line in lines)
