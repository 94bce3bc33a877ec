"""Reading a run folder's files for a section, and formatting numbers and names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from tunevax.data.splits import prompt_text
from tunevax.lineage import Lineage
from tunevax.records import read_lines, read_object
from tunevax.report.blocks import Table
from tunevax.report.provenance import Run

NONE = "–"
T = TypeVar("T")
LINES = 40  # rows of a table
LONGEST = 480  # characters of one output
WORDS = 160  # characters of a prompt in a table


def runs_of(runs: Iterable[Run], verb: str, method: str | None = None) -> list[Run]:
    """Those of a verb, and of a method if one is named."""
    return [run for run in runs if run.info.get("verb") == verb and method in (None, run.info.get("method"))]


def lines_of(run: Run, name: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file of the run, none without it."""
    return read_lines(run.path / name)


def json_of(run: Run, name: str) -> dict[str, Any]:
    """A JSON file of the run, {} without it."""
    return read_object(run.path / name) if (run.path / name).is_file() else {}


def rows_of(run: Run, role: str) -> int:
    """How many rows of a role the run used."""
    return sum(d.get("rows") or 0 for d in run.info.get("data") or [] if d.get("role") == role)


def model_of(run: Run) -> str:
    """A short name of the model a run started from."""
    ref = Lineage.of(run.path).parent
    return Path(ref).name if ref else "a model that is not recorded"


def spread(items: list[T], most: int) -> list[T]:
    """At most about `most` of the items, evenly spaced."""
    return items[:: math.ceil(len(items) / most)] if len(items) > most else items


def cut_table(label: str, columns: list[str], lines: list[list[str]], what: str, most: int = LINES) -> Table:
    """A table of at most `most` lines; the rest is counted."""
    left = len(lines) - most
    return Table(label, columns, lines[:most], f"{left:,} more {what} are not shown." if left > 0 else "")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def as_text(value: object) -> str:
    """A prompt or answer as one string, chat messages one per line."""
    return "" if value is None else prompt_text(value) if isinstance(value, str | list) else str(value)


def as_words(value: object) -> str:
    """Text for a table, cut to WORDS characters."""
    text = as_text(value)
    return text if len(text) <= WORDS else text[:WORDS] + "…"


def plain(text: str) -> str:
    """Text that a figure can hold."""
    return visible(str(text)).encode("utf-8", errors="replace").decode()


def listed(names: Sequence[str]) -> str:
    """Names, each once, with commas."""
    return ", ".join(dict.fromkeys(map(str, names)))


def decimals(value: float | None, digits: int) -> str:
    """A number with so many digits, a dash without one."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def ends_of(score: Mapping[str, float]) -> str:
    """'88, 100', the interval of a score in percent."""
    return ", ".join(f"{100 * score.get(end, score['value']):.0f}" for end in ("low", "high"))


def shown(text: str, most: int = LONGEST) -> str:
    """Text of a model or judge, cut to `most` characters, control and direction characters made visible."""
    left = len(text) - most
    return visible(text[:most]) + (f"… ({left:,} more characters)" if left > 0 else "")


def visible(text: str) -> str:
    """Text whose control and direction characters are visible, and cannot reorder the text around them."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text)
    return re.sub(r"[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def as_p(value: float | None) -> str:
    """A p-value."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def cell_text(value: float | None) -> str:
    """A cell of a heat map: percent without the sign."""
    return NONE if value is None else f"{100 * value:.0f}"
