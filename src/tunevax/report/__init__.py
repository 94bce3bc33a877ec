"""`tunevax report`: run folders in, one page out (HTML, Markdown or JSON). Same folders, same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.errors import UsageError
from tunevax.evidence.findings import EPSILON, PHI, Findings
from tunevax.evidence.measure import measure
from tunevax.evidence.results import Results, read_results
from tunevax.report import audit_page, pages, tables
from tunevax.report import runs as stages
from tunevax.report.blocks import Table
from tunevax.report.provenance import Provenance, Run, trace

FORMATS = ("html", "json", "md")


class Summary(NamedTuple):
    """A report for the terminal: its opening sentences, and its first table if anything was measured."""

    headline: list[str]
    table: Table | None


def write_report(runs: Iterable[Path], output: Path, format: str = "html") -> Summary:
    """Write the report on `runs` (run folders of any verb) to `output` as html (one self-contained file), md (sentences
    and tables) or json (all numbers); return its summary.

    Models, controls, their ancestors and the curation runs of their rows are found through the runs' targets and
    parents, and need not be named. The thresholds are those of the audits among the runs, else the defaults of
    `tunevax.evidence.findings`. Raises `UsageError`: a folder that is no run, a run of a newer schema, a damaged line;
    two audits whose thresholds differ; `output` is a folder.
    """
    output = Path(output)
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file, for example {output / f'report.{format}'}")
    results, findings, provenance = collect(runs)
    if format == "json":
        text = json.dumps(_as_dict(results, findings, provenance), indent=1, default=str, allow_nan=False) + "\n"
    else:
        content = audit_page.content(results, findings, provenance, figures=format == "html")
        text = pages.to_html(content) if format == "html" else pages.to_markdown(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    part.write_bytes(text.encode("utf-8", errors="replace"))  # it may hold lone surrogates, which UTF-8 cannot
    part.replace(output)
    if findings is None:
        return Summary([audit_page.nothing(provenance), *stages.summaries(provenance)], None)
    return Summary([*findings.headline, *findings.sentences], tables.overview(findings))


def collect(paths: Iterable[Path]) -> tuple[Results | None, Findings | None, Provenance]:
    """Read the runs, their findings and their ancestors; None where nothing was measured. Errors as `write_report`."""
    runs = [Run.load(path) for path in dict.fromkeys(Path(p).resolve() for p in paths)]
    if not runs:
        raise UsageError("no run folder was named; give at least one, for example runs/attack")
    measured = [run.path for run in runs if run.measures]
    results = read_results(measured) if measured else None
    provenance = trace(runs, results)
    if results is None:
        return None, None, provenance
    phi = provenance.threshold("phi", PHI)
    return results, measure(results, phi, provenance.threshold("epsilon", EPSILON)), provenance


def _as_dict(results: Results | None, findings: Findings | None, provenance: Provenance) -> dict[str, Any]:
    """The findings, run.json of each run behind them, and what the stages measured, as JSON."""
    chains = {
        label: [[run.info if isinstance(run, Run) else run for run in chain] for chain in several]
        for label, several in provenance.chains.items()
    }
    content = {**findings.as_dict(), "notes": results.notes} if findings and results else {}
    behind = {"runs": [run.info for run in provenance.runs], "chains": chains}
    return {"schema": 1, **content, "stages": stages.as_dict(provenance), "provenance": behind}
