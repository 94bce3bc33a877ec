"""Methods by their name on the command line: tunevax's own, and those of installed packages."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from tunevax.errors import unknown


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
