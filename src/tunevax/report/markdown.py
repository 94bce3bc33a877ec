"""A report as Markdown: the sentences and tables."""

from __future__ import annotations

import re
from typing import Any

from tunevax.report.blocks import HeatMap, Page, Table
from tunevax.report.html import commands
from tunevax.report.provenance import Run
from tunevax.report.text import cell_text, shown, visible


def to_markdown(page: Page) -> str:
    """The sentences and tables as plain Markdown."""
    lines = ["# tunevax report", ""]
    lines += [f"**{_escaped(page.label)}**", ""] if page.label else []
    for sentence, caveats in page.headlines:
        lines += [_escaped(sentence), "", *(f"- {_escaped(c)}" for c in caveats), *([""] if caveats else [])]
    lines += [*(f"- {_escaped(s)}" for s in page.sentences), ""]
    for section in page.sections:
        lines += [f"## {_escaped(section.title)}", "", *([_escaped(section.text), ""] if section.text else [])]
        lines += [*(f"- {_escaped(p)}" for p in section.points), *([""] if section.points else [])]
        heat = [_heat_table(m) for m in section.maps]
        for table in [*heat, *section.tables]:
            lines += _table(table)
        for group in section.outputs:
            lines += [f"### {_escaped(group['title'])}", ""]
            for column in group["columns"]:
                lines += _outputs(column)
        lines += [_escaped(section.note), ""] if section.note else []
    lines += ["## Commands", "", *(f"    {visible(command)}" for command in commands(page.provenance)), ""]
    for label, several in page.provenance.chains.items():
        text = " | ".join(" ← ".join(link.name if isinstance(link, Run) else link for link in c) for c in several)
        lines.append(f"- {_escaped(label)}: {_escaped(text)}")
    return "\n".join(lines).rstrip() + "\n"


def _heat_table(heat: HeatMap) -> Table:
    rows = [[rate, *map(cell_text, row)] for rate, row in zip(heat.rates, heat.cells, strict=True)]
    return Table(f"{heat.model}, by learning rate and step", ["learning rate", *map(str, heat.steps)], rows)


def _table(table: Table) -> list[str]:
    if not table.rows:
        return []
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(c if c == "---" else _escaped(c) for c in row) + " |" for row in rows]
    return [f"**{_escaped(table.label)}**", "", *lines, "", *([_escaped(table.note), ""] if table.note else [])]


def _outputs(column: dict[str, Any]) -> list[str]:
    lines = [_escaped(column["title"]), ""] if column["title"] else []
    for s in column["samples"]:
        marks = [text for text in (s["kind"], s["category"]) if text]
        marks += [f"{name}: {verdict}" for name, verdict, _ in s["marks"]] + ["degenerate"] * s["degenerate"]
        lines += [f"- {_escaped(shown(s['prompt']))}", f"  - {_escaped(shown(s['response']) or '(empty)')}"]
        lines += [f"  - ({_escaped(shown('; '.join(marks)))})"]
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", visible(text)).strip()
    text = re.sub(r"[\\`*_<>|&~$#!]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(:\[])", r"\\]", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    text = re.sub(r"^[-+=](?=\s|$|[-=])", r"\\\g<0>", text)
    return text.replace("://", ":\\//").replace("www.", "www\\.")
