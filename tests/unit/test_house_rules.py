"""The rules of the house as tests: which way imports point, how large packages and files get, who may print."""

import ast
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import mythos_ds

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mythos_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
MAINS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "launch").glob("*.py")])

ORDER = (
    ("root",),
    ("kernels",),
    ("config",),
    ("costs",),
    ("model",),
    ("weights",),
    ("data",),
    ("monitor",),
    ("resilience",),
    ("parallel",),
    ("engine",),
    ("checkpoint",),
    ("inference",),
    ("train",),
    ("conversion", "plan", "analysis", "cluster"),
    ("lab", "bench"),
    ("api",),
    ("__init__", "__main__"),
    ("mains", "tools", "launch"),
)
"""Each may import what stands before it, and itself; packages of one line do not know each other. "root": the other
files beside the packages."""
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

LINES = {
    "root": 2_310,
    "kernels": 1_475,
    "config": 4_045,
    "costs": 1_890,
    "model": 2_270,
    "weights": 1_200,
    "data": 6_170,
    "monitor": 660,
    "resilience": 120,
    "parallel": 2_245,
    "engine": 1_065,
    "checkpoint": 1_830,
    "inference": 190,
    "train": 2_260,
    "conversion": 3_450,
    "plan": 2_945,
    "analysis": 1_240,
    "cluster": 1_780,
    "lab": 3_870,
    "bench": 2_015,
    "api": 460,
    "__init__": 60,
    "__main__": 140,
    "mains": 100,
}
"""Lines that a package may have; a larger number is a line of the CHANGELOG with its reason."""
READING_PATH = ("kernels", "config", "model", "parallel", "engine", "train")
"""What one must read to trust a training run."""
MAX_READING_PATH = 13_360
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

OWN = ("mythos_ds", "mythos_hf", "mythos_vllm", "tools", "launch", "tests", "examples", "setup")
"""Where code is, by the names that type checkers know it by."""

LIBRARIES = {
    "deepspeed": {"parallel", "engine", "checkpoint", "bench"},
    "torch.distributed": {"parallel", "engine", "checkpoint", "bench", "cluster/preflight"},
    "megatron": {"data"},
}
"""Who may import a library."""
WITHOUT_TORCH = {"root", "config", "costs", "cluster/hostfile.py", "cluster/job_files.py"}
NOT_FOR_INFERENCE = {"deepspeed", "mythos_ds.engine", "mythos_ds.parallel"}

MAY_EXIT = {
    "__main__.py",
    "bench/acceptance_worker.py",
    "bench/calibration_worker.py",
    "data/encoding.py",
    "guard.py",
    "lab/worker.py",
    "resilience/failure.py",
    "weights/writer.py",
}
"""Files that end workers or ranks, and the command."""
MAY_NAME_PYTHONPATH = {
    "launch/mpirun.sh",  # hands on the user's own
    "mythos_ds/cluster/preflight/ssh.py",  # the same
    "tests/faults/test_preflight.py",  # gives one rank other packages
    "tests/unit/test_house_rules.py",
}

WITHOUT_UNIT_TESTS = {"engine", "parallel", "resilience"}
"""Packages that only whole runs, of one process or several, test: tests/distributed and tests/faults."""


def short(path: Path) -> str:
    """A file's path inside the package."""
    return path.relative_to(PACKAGE).as_posix()


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


def part_of(path: Path) -> str:
    """The package that a file belongs to, or what it is beside the packages."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return first if first in LEVEL else "root"


def wrong_imports(path: Path) -> set[str]:
    """Modules that a file imports though they come after it."""
    part = part_of(path)
    wrong = set()
    for name in _modules(path):
        parts = name.split(".")
        if parts[0] != "mythos_ds" or len(parts) == 1:
            continue
        other = parts[1] if parts[1] in LEVEL else "root"
        if other != part and LEVEL[other] >= LEVEL[part]:
            wrong.add(name)
    return wrong | _wrong_libraries(path)


def _wrong_libraries(path: Path) -> set[str]:
    part, place = part_of(path), short(path)
    wrong = set()
    for name in _imports(path):
        for library, users in LIBRARIES.items():
            inside = part in users or any(place.startswith(user) for user in users)
            if _is(name, library) and not inside:
                wrong.add(library)
        if _is(name, "torch") and (part in WITHOUT_TORCH or place in WITHOUT_TORCH):
            wrong.add("torch")
        if part == "inference":
            wrong |= {library for library in NOT_FOR_INFERENCE if _is(name, library)}
    return wrong


def _is(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def _modules(path: Path) -> set[str]:
    """The modules (not the names in them) of the project that a file imports."""
    found = set()
    for name in _imports(path):
        if name.startswith("mythos_ds."):
            file = ROOT.joinpath(*name.split("."))
            if file.with_suffix(".py").is_file() or file.is_dir() or name.split(".")[1] in ("tools", "launch"):
                found.add(name)
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def package_lines() -> dict[str, int]:
    """Lines by package."""
    lines: Counter[str] = Counter()
    for path in FILES:
        lines[part_of(path)] += len(path.read_text().splitlines())
    return dict(lines)


def same_names() -> set[str]:
    """Names that more than one public class of the package has."""
    places = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(path)
    return {name for name, found in places.items() if len(found) > 1}


def unused_definitions() -> set[str]:
    """Public functions and classes of the package, outside the face, that no code beside the tests uses."""
    folders = ("mythos_ds", "tools", "launch", "examples", "mythos_hf", "mythos_vllm")
    trees = {path: ast.parse(path.read_text()) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}
    used: set[tuple[str, str]] = set()
    for path, tree in trees.items():
        used |= _used_elsewhere(path, tree)
    face = set(mythos_ds.__all__)  # the tests of the face ask for a user of each
    unused = set()
    for path in FILES:
        names = _names(trees[path])
        for node in trees[path].body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                inside = names[node.name] > _names(node)[node.name]
                of_face = short(path) == "api.py" and node.name in face
                if not inside and not of_face and (MODULES[path], node.name) not in used:
                    unused.add(f"{short(path)}: {node.name}")
    return unused


def _names(tree: ast.AST) -> Counter[str]:
    """How often each name is read in code, by itself or as an attribute."""
    nodes = list(ast.walk(tree))
    alone = [node.id for node in nodes if isinstance(node, ast.Name)]
    return Counter([*alone, *(node.attr for node in nodes if isinstance(node, ast.Attribute))])


def _used_elsewhere(path: Path, tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name) of what a file imports, or reads as an attribute where it imports or names the module."""
    imported = list(_imports(path))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {(module, name) for module, _, name in (text.rpartition(".") for text in imported)}
    return used | {(module, name) for module in {*imported, *texts} & set(MODULES.values()) for name in attributes}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_imports(path) == set()


def test_megatron_is_imported_when_it_is_needed() -> None:
    early = [path for path in FILES if any(name.startswith("megatron") for name in _imports(path, top_level_only=True))]
    assert not early


def test_packages_keep_their_size() -> None:
    lines = package_lines()
    assert set(lines) == set(LINES)
    assert {name: size for name, size in lines.items() if size > LINES[name]} == {}
    assert sum(lines[name] for name in READING_PATH) < MAX_READING_PATH


def test_files_and_functions_stay_small() -> None:
    folders = ("tests", "tools", "launch", "mythos_hf", "mythos_vllm")
    others = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in [*FILES, *others]}
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}
    for path in [*FILES, *MAINS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_a_public_class_has_a_name_of_its_own() -> None:
    assert same_names() == set()


def test_a_public_definition_has_a_user_outside_its_tests() -> None:
    assert unused_definitions() == set()


def test_the_package_does_not_print_and_has_no_utils() -> None:
    for path in FILES:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert "print" not in names, path
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_the_package_does_not_end_the_process() -> None:
    """Errors are raised, and a main turns them into an exit code; the files in MAY_EXIT end workers or ranks."""
    exits = {"exit", "quit", "sys.exit", "os._exit"}
    for path in FILES:
        if short(path) in MAY_EXIT:
            continue
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not exits & set(calls), path


def test_one_place_initialises_deepspeed() -> None:
    places = [path for path in FILES if "deepspeed.initialize(" in path.read_text()]
    assert [short(path) for path in places] == ["engine/build.py"]


def test_the_export_knows_nothing_of_the_package() -> None:
    for folder in ("mythos_hf", "mythos_vllm"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.startswith(("mythos_ds", "deepspeed")) for name in _imports(path)), path


def test_code_is_found_because_it_is_installed() -> None:
    tricks = re.compile(r"sys\.path\b|syspath_prepend|PYTHONPATH|^pythonpath", re.M)
    patterns = ("*.py", "*.sh", "*.sbatch", "*.yaml", "*.toml", "Makefile")
    folders = [PACKAGE, *(ROOT / name for name in ("tools", "launch", "tests", "mythos_hf", "mythos_vllm"))]
    files = [path for folder in folders for pattern in patterns for path in folder.rglob(pattern)]
    files += [path for pattern in patterns for path in ROOT.glob(pattern)]
    found = {path.relative_to(ROOT).as_posix() for path in files if tricks.search(path.read_text())}
    assert found <= MAY_NAME_PYTHONPATH


def test_unit_tests_stand_where_the_packages_do() -> None:
    """And none imports a main by the name it has in a wheel, which type checkers cannot follow."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    folders = {path.parent.name for path in files if path.parent.parent == ROOT / "tests" / "unit"}
    packages = {path.parent.name for path in FILES if path.parent.parent == PACKAGE}
    assert packages - folders == WITHOUT_UNIT_TESTS
    assert folders <= packages
    mains = ("mythos_ds.tools", "mythos_ds.launch")
    assert not [path for path in files if any(_is(name, main) for name in _imports(path) for main in mains)]


def test_mypy_reads_every_file() -> None:
    """Folders that make or training write hold no code of ours; only libraries may be skipped or silent."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert (settings["files"], settings["exclude"]) == (["."], ["^build/", "^data/", "^runs/"])
    libraries = {name for override in settings["overrides"] for name in override["module"]}
    assert not {name for name in libraries if name.split(".")[0] in (*OWN, "*")}


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Reading and writing text names its encoding; what is opened without is opened as bytes."""
    unnamed = []
    for path in [*FILES, *MAINS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            named = any(keyword.arg in ("encoding", None) for keyword in node.keywords)
            texts = [ast.literal_eval(word) for word in node.args if isinstance(word, ast.Constant)]
            as_bytes = any(isinstance(text, str) and "b" in text and len(text) <= 3 for text in texts)
            opens = name == "open" or (name.endswith(".open") and texts and not as_bytes and len(str(texts[0])) <= 2)
            if not named and (name.endswith((".read_text", ".write_text")) or (opens and not as_bytes)):
                unnamed.append(f"{path}:{node.lineno}")
    assert unnamed == []


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
