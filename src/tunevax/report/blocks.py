"""What a page is made of: sections, tables and heat maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunevax.report.provenance import Provenance


@dataclass
class Section:
    """A heading with what stands under it, in this order.

    Attributes:
        panels, folded: (caption, svg), on view and folded away. note: what is left out.
        fold: the tables after the first are folded away. titled: the tables carry their labels.
        outputs: groups of model outputs, as `_sample` makes them.
    """

    title: str
    text: str = ""
    points: list[str] = field(default_factory=list)
    panels: list[tuple[str, str]] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
    maps: list[HeatMap] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    fold: bool = False
    titled: bool = False

    def __bool__(self) -> bool:
        return any((self.points, self.panels, self.maps, self.tables, self.outputs))


@dataclass
class Table:
    """Strings under `columns`; a repeated first cell is shown once. `note` says what was left out."""

    label: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class HeatMap:
    """Worst harmful score of one model by learning rate and step; None where nothing was evaluated.

    `rates` name the rows: learning rates, with what is trained where that differs.
    """

    model: str
    rates: list[str]
    steps: list[int]
    cells: list[list[float | None]]


PANELS = 8  # figures of one sort on view, the attacks that the control withstands least first


NOTES = 12  # sentences of one list


@dataclass
class Page:
    """All that a page says.

    Attributes:
        headlines: (sentence, caveats), one per hardened model. sentences: on the whole.
        label: a warning that belongs on top, or ''.
    """

    headlines: list[tuple[str, list[str]]]
    sentences: list[str]
    label: str
    sections: list[Section]
    provenance: Provenance
    several_seeds: bool = False
    phi: str = ""
    threshold: float = 0.0


def cut(sentences: list[str]) -> list[str]:
    """Each sentence once, at most NOTES of them; the rest is counted."""
    kept = list(dict.fromkeys(sentences))
    return (
        kept if len(kept) <= NOTES else [*kept[:NOTES], f"{len(kept) - NOTES:,} more remarks stand in --format json."]
    )
