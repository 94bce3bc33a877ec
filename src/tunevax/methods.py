"""Methods by their name on the command line: tunevax's own, and those of installed packages."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from tunevax.errors import unknown

NEEDS = {
    "chosen": "the safe answer in every row of the safety data",
    "rejected": "the harmful answer in every row of the safety data",
    "task": "rows of a task: a publisher's benign ones, a customer's job, an attacker's",
    "harmful": "harmful rows to attack with",
    "model": "a model that scores",
    "validation": "trusted rows",
}
"""What a method, an attack or a selector names in its attribute `needs`, a frozenset: the data that must be there."""


def methods(folder: str) -> dict[str, str]:
    """Command-line name to `module:attribute` of a folder such as `tunevax.alignment`.

    Other packages add theirs by an entry-point group of the folder's name.
    """
    found = dict(importlib.import_module(folder).METHODS)
    return found | {e.name: e.value for e in entry_points(group=folder) if e.name not in found}


def load_method(folder: str, name: str) -> Any:
    """What a name stands for, imported.

    Raises:
        UsageError: an unknown name; the nearest known one is named.
    """
    known = methods(folder)
    if name not in known:
        raise unknown("method", name, known)
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def name_of(kind: type) -> str:
    """The name on the command line of a method's class; where it has none, the name of the class."""
    package = kind.__module__.partition(".")[0]
    for folder in ("tunevax.alignment", "tunevax.finetuning"):
        for name, value in methods(folder).items():
            if value.endswith(f":{kind.__qualname__}") and value.startswith((f"{package}.", f"{package}:")):
                return name
    return kind.__name__
