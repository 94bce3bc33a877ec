"""Methods of tunevax and of installed packages, by their name on the command line."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from tunevax.errors import UsageError, unknown

NEEDS = {
    "chosen": "the safe answer in every row of the safety data",
    "rejected": "the harmful answer in every row of the safety data",
    "task": "rows of a task: a publisher's benign ones, a customer's job, an attacker's",
    "harmful": "harmful rows to attack with",
    "model": "a model that scores",
    "validation": "trusted rows",
}
"""The data that a method, an attack or a selector requires, named in its attribute `needs`, a frozenset."""


def methods(folder: str) -> dict[str, str]:
    """Command-line name to `module:attribute` of a folder such as `tunevax.alignment` or `tunevax.scoring.judges`.

    Other packages add theirs by an entry-point group of the folder's last name: `tunevax.alignment`, `tunevax.judges`.
    tunevax's own names cannot be replaced.
    """
    own = dict(importlib.import_module(folder).METHODS)
    return own | {e.name: e.value for e in entry_points(group=_group(folder)) if e.name not in own}


def _group(folder: str) -> str:
    return f"tunevax.{folder.rpartition('.')[2]}"


def load_method(folder: str, name: str, kind: str = "method", *others: str) -> Any:
    """Import what a name stands for. Raises `UsageError`, in which it is called a `kind`: an unknown name (`others` are
    known too), one that several packages claim, or a package of which it cannot be imported."""
    known = methods(folder)
    if name not in known:
        raise unknown(kind, name, [*known, *others])
    if name in importlib.import_module(folder).METHODS:
        return attribute(known[name])
    claimed = sorted({entry.value for entry in entry_points(group=_group(folder), name=name)})
    if len(claimed) > 1:
        raise UsageError(f"{kind} {name} is claimed by several packages ({', '.join(claimed)}); uninstall all but one")
    try:
        return attribute(known[name])
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{kind} {name} cannot be imported from {known[name]} ({error}); fix or uninstall its package"
        ) from error


def attribute(target: str) -> Any:
    """Import `module:attribute`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def name_of(kind: type) -> str:
    """The name of a method's class on the command line; without one, the name of the class."""
    package = kind.__module__.partition(".")[0]
    for folder in ("tunevax.alignment", "tunevax.finetuning"):
        for name, value in methods(folder).items():
            if value.endswith(f":{kind.__qualname__}") and value.startswith((f"{package}.", f"{package}:")):
                return name
    return kind.__name__
