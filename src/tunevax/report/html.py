"""A report as one HTML file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tunevax.evidence.findings import DEGENERATE_HIGH
from tunevax.evidence.words import percent
from tunevax.report.blocks import Page
from tunevax.report.provenance import Provenance, facts
from tunevax.report.text import cell_text, shown, visible

if TYPE_CHECKING:
    from markupsafe import Markup

CONFIG = 2_000  # characters of one value of a configuration


def to_html(page: Page) -> str:
    """One self-contained file, without scripts or requests."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("tunevax.report", "")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"numbers": _numbers, "shown": shown, "svg": Markup, "value": _value, "percentage": cell_text}
    return env.get_template("page.html.j2").render(
        page=page,
        chains={label: [[*map(facts, chain)] for chain in chains] for label, chains in page.provenance.chains.items()},
        measurements=[facts(run) for run in page.provenance.measurements],
        commands=commands(page.provenance),
        degenerate_high=percent(DEGENERATE_HIGH),
    )


def commands(provenance: Provenance) -> list[str]:
    """The commands that made these results, each once."""
    return list(dict.fromkeys(str(r.info["command"]) for r in provenance.runs if r.info.get("command")))


def _numbers(text: object) -> Markup:
    """Escaped text in which neither 't-vaccine' nor '98 % [88, 100]' breaks, and intervals are marked up."""
    from markupsafe import Markup, escape

    safe = str(escape(visible(str(text)))).replace(" %", "\u00a0%")
    safe = re.sub(
        r"(?<=[\d%×]) \[([+−\d.,]+|0), ([+−\d.,]+|∞)\]", '\u00a0<span class="iv">[\\1,\u00a0\\2]</span>', safe
    )
    safe = re.sub(r"(?<![\w\-/.&;])[\w.]{1,12}(?:-[\w.]{1,12}){1,2}(?![\w\-/])", r'<span class="nb">\g<0></span>', safe)
    return Markup(safe)


def _value(value: object) -> str:
    text = visible(str(value))
    return text if len(text) <= CONFIG else f"{text[:CONFIG]}… ({len(text) - CONFIG:,} more characters)"
