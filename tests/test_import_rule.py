"""The two wings: the plugin, and the experiments that import it."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ws_detectron

PACKAGE = Path(ws_detectron.__file__).parent


def imported_modules(path: Path) -> set[str]:
    """All that a file imports, in full names; also within functions."""
    package = ["ws_detectron", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


def test_nothing_outside_the_lab_imports_it() -> None:
    plugin = [p for p in PACKAGE.rglob("*.py") if "lab" not in p.relative_to(PACKAGE).parts[:1]]
    assert len(plugin) > 30
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(found)
        for path in plugin
        if (found := {m for m in imported_modules(path) if m.startswith("ws_detectron.lab")})
    }
    assert wrong == {}


def test_importing_the_package_loads_few_modules_and_none_of_the_lab() -> None:
    code = "import sys, ws_detectron; print(*(m for m in sys.modules if m[:12] == 'ws_detectron'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = result.stdout.split()
    assert "ws_detectron.layers" in loaded, result.stderr
    assert [m for m in loaded if m.startswith("ws_detectron.lab")] == []
    assert len(loaded) <= 35


def test_no_two_files_have_one_name() -> None:
    several = ("__init__.py", "env.py")  # both env.py are for DETECTRON2_ENV_MODULE
    names = Counter(p.name for p in PACKAGE.rglob("*.py") if p.name not in several)
    assert [name for name, count in names.items() if count > 1] == []
