"""scripts/: packages import no entry script and not each other in a circle, and scripts start from any folder."""

import ast
import subprocess
import sys
from functools import cache

import pytest

from support import ROOT

SCRIPTS = ROOT / "scripts"
MODULES = {".".join(path.relative_to(SCRIPTS).with_suffix("").parts): path for path in SCRIPTS.rglob("*.py")}


@cache
def imports(module):
    """Modules of scripts/ that a module imports anywhere, functions and `TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & MODULES.keys()


def test_packages_import_no_entry_script():
    assert len(MODULES) > 40
    found = [(module, other) for module in MODULES if "." in module for other in imports(module) if "." not in other]
    assert not found


def test_no_circle():
    def levels(module, above=()):
        assert module not in above, (*above, module)
        return 1 + max((levels(other, (*above, module)) for other in imports(module)), default=0)

    assert max(map(levels, MODULES)) <= 9


@pytest.mark.parametrize(
    "package, known", [("finetuning", ()), ("tasks", ("finetuning",)), ("reporting", ("finetuning",))]
)
def test_what_others_build_on_knows_none_of_them(package, known):
    for module in MODULES:
        if module.startswith(f"{package}."):
            assert {other.partition(".")[0] for other in imports(module)} <= {package, *known}, module


@pytest.mark.parametrize("script", ["demo_data.py", "reference_cards.py"])
def test_scripts_start_from_any_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
