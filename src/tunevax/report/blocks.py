"""The parts of a report: sections, tables and heat maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunevax.report.provenance import Provenance

PANELS = 8  # figures of one sort on view
NOTES = 12  # sentences of one list


@dataclass
class Section:
    """A heading and its contents, in this order."""

    title: str
    text: str = ""
    points: list[str] = field(default_factory=list)
    panels: list[tuple[str, str]] = field(default_factory=list)  # (caption, svg)
    folded: list[tuple[str, str]] = field(default_factory=list)  # the same, folded away
    maps: list[HeatMap] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)  # groups of model outputs
    note: str = ""  # what is left out
    fold: bool = False  # the tables after the first are folded away
    titled: bool = False  # the tables carry their labels

    def __bool__(self) -> bool:
        return any((self.points, self.panels, self.maps, self.tables, self.outputs))


@dataclass
class Table:
    """Strings by row and column; a repeated first cell is shown once. `note` is on what was left out."""

    label: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class HeatMap:
    """Worst harmful score of one model by learning rate and step; None where nothing was evaluated."""

    model: str
    rates: list[str]  # learning rates, with what is trained where that differs
    steps: list[int]
    cells: list[list[float | None]]


@dataclass
class Page:
    """The content of a report."""

    headlines: list[tuple[str, list[str]]]  # (sentence, caveats), one per hardened model
    sentences: list[str]  # on the whole
    label: str  # a warning at the top, or ''
    sections: list[Section]
    provenance: Provenance
    several_seeds: bool = False
    threshold: float = 0.0


def cut(sentences: list[str]) -> list[str]:
    """Each sentence once, at most NOTES of them; the rest is counted."""
    kept = list(dict.fromkeys(sentences))
    more = len(kept) - NOTES
    return kept[:NOTES] + [f"{more:,} more remarks are in --format json."] * (more > 0)
