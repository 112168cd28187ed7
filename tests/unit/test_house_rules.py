"""The rules of the house as tests: which way imports point, how large files get, who may print."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mythos_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

CHAIN = ("config", "model", "parallel", "engine", "checkpoint", "train")
"""Each may import what stands before it."""
BESIDE = {
    "data": {"config", "data"},
    "plan": {"config", "plan"},
    "monitor": {"config", "monitor", "plan"},
}
EVERYWHERE = {"errors", "log", "environment", "durable"}
SIDE_USERS = {"train", "checkpoint"}
"""Who may import the packages that stand beside the chain."""

MAY_EXIT = {"data/prepare.py", "train/failure.py"}
MAX_FILE_LINES = 600
MAX_PACKAGE_LINES = 12_000


def _imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module that a from-import names; dots count from the file's own package."""
    folders = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
    return ".".join([*folders, *([node.module] if node.module else [])])


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_parts(path: Path) -> set[str]:
    own = (name.split(".") for name in _imports(path))
    return {name[1] for name in own if name[0] == "mythos_ds" and len(name) > 1}


def _allowed(part: str) -> set[str]:
    if part in CHAIN:
        before = set(CHAIN[: CHAIN.index(part) + 1])
        return before | EVERYWHERE | (set(BESIDE) if part in SIDE_USERS else set())
    return BESIDE.get(part, set()) | EVERYWHERE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    wrong = _imported_parts(path) - _allowed(_part(path)) - {"__version__"}
    assert not wrong, f"{path.name} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("deepspeed", {"parallel", "engine", "checkpoint"}),
        ("torch.distributed", {"parallel", "engine", "checkpoint"}),
        ("torch", {"model", "parallel", "engine", "checkpoint", "train", "data", "monitor"}),
        ("megatron", {"data"}),
    ],
)
def test_libraries_are_imported_where_they_belong(library: str, users: set[str]) -> None:
    def uses(path: Path) -> bool:
        return any(name == library or name.startswith(library + ".") for name in _imports(path))

    assert {_part(path) for path in FILES if uses(path)} <= users


def test_megatron_is_imported_when_it_is_needed() -> None:
    early = [path for path in FILES if any(name.startswith("megatron") for name in _imports(path, top_level_only=True))]
    assert not early


def test_files_and_the_package_stay_small() -> None:
    others = [path for folder in ("tests", "tools", "launch", "mythos_hf") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in [*FILES, *others]}
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}
    assert sum(length for path, length in lengths.items() if path in FILES) < MAX_PACKAGE_LINES


def test_the_package_does_not_print_and_has_no_utils() -> None:
    for path in FILES:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert "print" not in names, path
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_the_package_does_not_end_the_process() -> None:
    """Errors are raised, and launch/ turns them into an exit code; the files in MAY_EXIT end workers or ranks."""
    exits = {"exit", "quit", "sys.exit", "os._exit"}
    for path in FILES:
        if path.relative_to(PACKAGE).as_posix() in MAY_EXIT:
            continue
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not exits & set(calls), path


def test_one_place_initialises_deepspeed() -> None:
    places = [path for path in FILES if "deepspeed.initialize(" in path.read_text()]
    assert [path.relative_to(PACKAGE).as_posix() for path in places] == ["engine/build.py"]


def test_the_package_knows_nothing_of_the_tools_and_the_export_nothing_of_the_package() -> None:
    tools = {path.name for path in (ROOT / "tools").iterdir() if path.is_dir()}
    for path in FILES:
        assert not tools & {name.split(".")[0] for name in _imports(path)}, path
    for path in (ROOT / "mythos_hf").rglob("*.py"):
        assert not any(name.startswith(("mythos_ds", "deepspeed")) for name in _imports(path)), path


def test_nothing_needs_a_file_outside_the_project() -> None:
    suffixes = {".py", ".md", ".json", ".toml", ".sh", ".sbatch", ""}
    tracked = [
        path
        for folder in ("mythos_ds", "mythos_hf", "ds_configs", "launch", "tools", "tests", "docs", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
    ]
    marks = ["../" + "shared", "/" + "work/", "/" + "root/"]
    assert not [path for path in tracked if any(mark in path.read_text(errors="ignore") for mark in marks)]
