"""`tunevax list`: all methods, attacks, judges and protocols, read without importing them."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tunevax.cli.options import Parser
from tunevax.errors import unknown
from tunevax.methods import methods


def show(arguments: list[str]) -> None:
    """`tunevax list [WHAT]`."""
    about = "All methods, attacks, judges and protocols, with a line and the paper of each."
    parser = Parser(prog="tunevax list", description=about)
    parser.add_argument("what", nargs="?", help=f"one of {', '.join(LISTS)}; default all")
    what = parser.parse_args(arguments).what
    if what is not None and what not in LISTS:
        raise unknown("list", what, LISTS)
    for name in [what] if what else LISTS:
        print(f"{name}\n" + "\n".join(LISTS[name]()) + "\n")


def _protocols() -> list[str]:
    from tunevax.audit.protocol import SHIPPED
    from tunevax.yaml_files import read_yaml

    files = sorted(SHIPPED.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    return [f"  {file.stem:{width}}  {' '.join(read_yaml(file)['about'].split())}" for file in files]


def lines_of(folder: str) -> list[str]:
    """A line for each method of a package: name, first sentence of the docstring, and paper."""
    known = methods(folder)
    width = max(map(len, known))
    lines = []
    for name, target in known.items():
        spec = importlib.util.find_spec(target.partition(":")[0])
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
        first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
        summary = first[: end.start() + 1] if (end := re.search(r"(?<!al)\. ", first)) else first
        paper = next(filter(None, map(_paper, ast.walk(tree))), "")
        number = re.search(r"\d{4}\.\d{5}", paper)
        shown = f" [{paper}]" if paper and not (number and number[0] in summary) else ""
        lines.append(f"  {name:{width}}  {summary}{shown}")
    return lines


def _paper(node: ast.AST) -> str:
    """The string that a class names as its `paper`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    named = any(isinstance(target, ast.Name) and target.id == "paper" for target in targets)
    value = getattr(node, "value", None)
    return str(value.value) if named and isinstance(value, ast.Constant) else ""


PACKAGES = {"curate": "curation", "align": "alignment", "finetune": "finetuning", "restore": "restoration"}
PACKAGES |= {"attacks": "attacks", "judges": "scoring.judges"}
LISTS: dict[str, Callable[[], list[str]]] = {n: partial(lines_of, f"tunevax.{p}") for n, p in PACKAGES.items()}
LISTS["protocols"] = _protocols
