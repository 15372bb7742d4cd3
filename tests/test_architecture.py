"""The order of imports in hf_rdrop, what they load, and that no module reaches into another's private names."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "hf_rdrop"
# From the bottom up: a module or folder imports from those above its line in this list (lower levels) only.
LEVELS = (
    {"alpha", "batch", "checkpoints", "files", "functional", "hub", "version"},
    {"agreements", "contrastive", "dropout", "generators", "metrics", "sigterm"},
    {"loss", "objective"},
    {"consistency", "fused", "training_args", "trunk"},
    {"cost", "sub_models"},
    {"training"},
    {"cards"},
    {"trainer"},
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def entry(path: Path) -> str:
    """The module or folder on top of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module of the package that a file imports, `TYPE_CHECKING` included, with the names taken from it."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names = [alias.name for alias in node.names]
            found = [(module, names)] if node.module or not node.level else [(f"{module}.{n}", []) for n in names]
        elif isinstance(node, ast.Import):
            found = [(alias.name, []) for alias in node.names]
        else:
            continue
        yield from (pair for pair in found if pair[0].startswith("hf_rdrop."))


def test_imports_go_one_way():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    assert set(level) == {entry(path) for path in MODULES}
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in MODULES
        for module, _ in imported(path)
        if (other := module.split(".")[1]) != entry(path) and level[other] >= level[entry(path)]
    ]
    assert not upwards
    print(f"{len(level)} entries on {len(LEVELS)} levels")


def test_modules_of_a_folder_import_one_way():
    edges = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if not path.name.startswith("__init__"):  # those of folders hand on what their modules have
            edges[name] = {module for module, _ in imported(path)}
    seen: dict[str, int] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way, name))}"
        if name not in seen:
            for other in edges.get(name, ()):
                visit(other, (*way, name))
            seen[name] = 1

    for name in edges:
        visit(name, ())


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The private names that a module defines, and those that it reads of anything."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used.update(alias.name for alias in node.names)
    return set(filter(private, defined)), set(filter(private, used))


SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


@pytest.mark.parametrize("files", [MODULES, [*MODULES, *SCRIPTS]], ids=["package", "with scripts"])
def test_no_private_name_of_one_module_is_used_in_another(files):
    names = {path: private_names(ast.parse(path.read_text())) for path in files}
    owners: dict[str, set[Path]] = {}
    for path, (defined, _) in names.items():
        for name in defined:
            owners.setdefault(name, set()).add(path)
    reached = [
        f"{path.relative_to(PACKAGE.parent)}: {name}, of {next(iter(owners[name])).relative_to(PACKAGE.parent)}"
        for path, (defined, used) in names.items()
        for name in used - defined
        if name in owners
    ]
    assert not reached


def test_the_check_sees_a_private_name_reached_into():
    defined, used = private_names(ast.parse("from .x import _helper\nprint(thing._state)\nself._own = 1"))
    assert used == {"_helper", "_state"} and defined == {"_own"}


# ---- What is loaded when ----

IMPORTS = """
import sys
import hf_rdrop
heavy = ("torch", "transformers", "accelerate", "huggingface_hub")
assert not {*heavy} & sys.modules.keys(), "import hf_rdrop"
assert {*hf_rdrop.__all__} <= {*dir(hf_rdrop)}, "dir"
from hf_rdrop.functional import symmetric_kl
assert "torch" in sys.modules and not {*heavy[1:]} & sys.modules.keys(), "hf_rdrop.functional"
assert hf_rdrop.functional.symmetric_kl is symmetric_kl
assert len(hf_rdrop.__all__) == 14
for name in hf_rdrop.__all__:
    assert getattr(hf_rdrop, name) is not None, name
from hf_rdrop import *
assert RDropTrainer is hf_rdrop.trainer.RDropTrainer and __version__ == hf_rdrop.version.__version__
try:
    hf_rdrop.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise AssertionError
print("right")
"""


def test_names_are_loaded_when_they_are_first_used():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=environment)
    assert done.stdout == "right\n", done.stderr
    attribute = "import hf_rdrop; print(hf_rdrop.functional.__name__)"
    done = subprocess.run([sys.executable, "-c", attribute], capture_output=True, text=True, env=environment)
    assert done.stdout == "hf_rdrop.functional\n", done.stderr
