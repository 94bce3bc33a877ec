"""A report as one HTML file, or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tunevax.evidence.findings import DEGENERATE_HIGH
from tunevax.evidence.words import percent
from tunevax.report.blocks import HeatMap, Page, Table
from tunevax.report.provenance import Run, facts
from tunevax.report.text import cell_text, shown, visible

if TYPE_CHECKING:
    from markupsafe import Markup

CONFIG = 2_000  # characters of one value of a configuration


def to_html(page: Page) -> str:
    """One self-contained file, without scripts or requests."""
    from markupsafe import Markup

    filters: dict[str, Callable] = {
        "numbers": _numbers,
        "shown": shown,
        "svg": Markup,
        "value": partial(shown, most=CONFIG),
        "percentage": cell_text,
    }
    return _rendered(
        "page.html.j2", page, filters,
        chains={label: [[*map(facts, chain)] for chain in chains] for label, chains in page.provenance.chains.items()},
        measurements=[facts(run) for run in page.provenance.measurements],
        degenerate_high=percent(DEGENERATE_HIGH),
    )  # fmt: skip


def to_markdown(page: Page) -> str:
    """The sentences and tables as plain Markdown."""
    filters: dict[str, Callable] = {"escaped": _escaped, "shown": shown, "visible": visible}
    filters |= {"heat_table": _heat_table, "marks": _marks, "chains": _chains}
    return _rendered("page.md.j2", page, filters).rstrip() + "\n"


def _rendered(name: str, page: Page, filters: dict[str, Callable], **more: object) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    env = Environment(loader=PackageLoader("tunevax.report", ""), autoescape=name == "page.html.j2", **how)
    env.filters |= filters
    commands = dict.fromkeys(str(r.info["command"]) for r in page.provenance.runs if r.info.get("command"))
    return env.get_template(name).render(page=page, commands=[*commands], **more)


def _numbers(text: object) -> Markup:
    """Escaped text in which neither 't-vaccine' nor '98 % [88, 100]' breaks, and intervals are marked up."""
    from markupsafe import Markup, escape

    safe = str(escape(visible(str(text)))).replace(" %", "\u00a0%")
    interval = r"(?<=[\d%×]) \[([+−\d.,]+|0), ([+−\d.,]+|∞)\]"
    safe = re.sub(interval, '\u00a0<span class="iv">[\\1,\u00a0\\2]</span>', safe)
    safe = re.sub(r"(?<![\w\-/.&;])[\w.]{1,12}(?:-[\w.]{1,12}){1,2}(?![\w\-/])", r'<span class="nb">\g<0></span>', safe)
    return Markup(safe)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", visible(text)).strip()
    text = re.sub(r"[\\`*_<>|&~$#!]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(:\[])", r"\\]", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    text = re.sub(r"^[-+=](?=\s|$|[-=])", r"\\\g<0>", text)
    return text.replace("://", ":\\//").replace("www.", "www\\.")


def _heat_table(heat: HeatMap) -> Table:
    rows = [[rate, *map(cell_text, row)] for rate, row in zip(heat.rates, heat.cells, strict=True)]
    return Table(f"{heat.model}, by learning rate and step", ["learning rate", *map(str, heat.steps)], rows)


def _marks(sample: dict[str, Any]) -> str:
    verdicts = [f"{name}: {verdict}" for name, verdict, _ in sample["marks"]] + ["degenerate"] * sample["degenerate"]
    return "; ".join([*filter(None, (sample["kind"], sample["category"])), *verdicts])


def _chains(several: list[list[Run | str]]) -> str:
    return " | ".join(" ← ".join(link.name if isinstance(link, Run) else link for link in chain) for chain in several)
