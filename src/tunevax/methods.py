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
    """Command-line name to `module:attribute` of a folder such as `tunevax.alignment` or `tunevax.scoring.judges`.

    Other packages add theirs by an entry-point group of the folder's last name: `tunevax.alignment`, `tunevax.judges`.
    """
    found = dict(importlib.import_module(folder).METHODS)
    group = f"tunevax.{folder.rpartition('.')[2]}"
    return found | {e.name: e.value for e in entry_points(group=group) if e.name not in found}


def load_method(folder: str, name: str, kind: str = "method", *others: str) -> Any:
    """What a name stands for, imported.

    Args:
        kind: what is named, and `others`: further names that there are, for the message.

    Raises:
        UsageError: an unknown name; the nearest known one is named.
    """
    known = methods(folder)
    if name not in known:
        raise unknown(kind, name, [*known, *others])
    return attribute(known[name])


def attribute(target: str) -> Any:
    """What `module:attribute` stands for, imported."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def name_of(kind: type) -> str:
    """The name on the command line of a method's class; where it has none, the name of the class."""
    package = kind.__module__.partition(".")[0]
    for folder in ("tunevax.alignment", "tunevax.finetuning"):
        for name, value in methods(folder).items():
            if value.endswith(f":{kind.__qualname__}") and value.startswith((f"{package}.", f"{package}:")):
                return name
    return kind.__name__
