"""Methods by their name on the command line: tunevax's own, and those of installed packages."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from tunevax.errors import unknown


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
