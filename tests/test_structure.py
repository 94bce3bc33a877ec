"""The structure that CONTRIBUTING.md promises: imports go down and never in a circle, and no file is long."""

import ast
import subprocess
import sys
from pathlib import Path

import tunevax

SRC = Path(tunevax.__file__).parent
MODULES = {
    ".".join(p.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in SRC.rglob("*.py")
}
METHODS = ("alignment", "finetuning", "curation", "restoration", "attacks")
FLOORS = ("base", "data", "modeling", "training", "evidence", "report", "scoring", "stages", "planning", "audit", "cli")
"""From the lowest: what stands on one imports from its own and from lower ones."""
TOP = ("cli", "demo", "testing", "__main__")


def floor_of(module: str) -> int:
    if module == "tunevax":
        return 0
    top = module.split(".")[1]
    folder = "stages" if top in METHODS else "cli" if top in TOP else top
    return FLOORS.index(folder) if folder in FLOORS else 0


def imported(tree: ast.AST) -> set[str]:
    """The modules of tunevax that a file imports, also inside functions, but for what only types need."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunevax"):
            names |= {inner if (inner := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        names |= imported(node)
    return names & set(MODULES)


IMPORTS = {module: imported(ast.parse(path.read_text())) - {module} for module, path in MODULES.items()}


def test_imports_go_down():
    assert [f"{m} imports {i}" for m, names in IMPORTS.items() for i in names if floor_of(i) > floor_of(m)] == []


def test_imports_never_go_in_a_circle():
    left = dict(IMPORTS)
    while leaves := [m for m, names in left.items() if not names & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, f"in or above a circle: {sorted(left)}"


def test_no_file_is_longer_than_400_lines():
    lengths = {m: len(p.read_text().splitlines()) for m, p in MODULES.items()}
    assert {m: n for m, n in lengths.items() if n > 400} == {}


def test_reading_evidence_needs_no_torch():
    modules = sorted(m for m in MODULES if m.split(".")[1:2] in (["evidence"], ["report"]))
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
