"""The section of a report on curation: which rows were kept, and why the others were not."""

from __future__ import annotations

from collections import Counter
from statistics import fmean, median
from typing import Any

from tunevax.console import as_time
from tunevax.evidence.words import percent
from tunevax.records import SCORES
from tunevax.report import text as tx
from tunevax.report.blocks import PANELS, Section, Table, cut
from tunevax.report.provenance import Provenance, Run

ENDS = 3  # rows of the highest and of the lowest score
SHOWN = 4  # curation runs whose rows are shown
CATEGORIES = 14  # bars at most; with more a table
ROWS = 12  # rows of a table of examples
CORRUPTED = (
    "By chance an intact row scores higher in 50 % of pairs. p is the probability of a deviation as large by chance "
    "(Mann-Whitney): above 0.05 it is not shown that the selector notices."
)
ABOUT = "A selector scored every row of the alignment data, and the rows with the highest scores were kept, before any "
ABOUT += "alignment method used them."
SCORE = ("row", "place", "category", "corruption", "score", "rank", "kept", "why")
"""Of a row of scores.jsonl, without its text."""


def summary(run: Run) -> str:
    """A sentence on the run."""
    kept, total = run.info.get("kept", 0), tx.rows_of(run, "alignment")
    return f"{run.name}: chose {kept:,} of {total:,} alignment rows ({run.info.get('method')})."


def measured(run: Run) -> dict[str, Any]:
    """The content of the run's files, without the text of rows."""
    return {"scores": [{k: v for k, v in row.items() if k in SCORE} for row in tx.lines_of(run, SCORES)]}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """Which rows were kept."""
    behind, taken = provenance.behind, provenance.inputs
    runs, points, tables, outputs = tx.runs_of(behind, "curate"), [], [], []
    panels: list[tuple[str, str]] = []
    for i, run in enumerate(runs):
        scored = [row for row in tx.lines_of(run, SCORES) if tx.is_number(row.get("score"))]
        users = [user.name for user in behind if any(made.path == run.path for made in taken.get(user.path, []))]
        points.append(_chose(run, scored) + (f" Trained on them: {tx.listed(users)}." if users else ""))
        if not scored:
            continue
        kept, dropped = ([float(r["score"]) for r in scored if bool(r.get("kept")) == side] for side in (True, False))
        shares = _by_category(scored)
        if figures and len(panels) < PANELS:
            from tunevax.report import charts as fig
            from tunevax.report.figures import bars as drawn_bars

            title = f"{run.name}: scores of the rows"
            panels.append((title, fig.histogram(f"curate{i}-scores", tx.plain(title), kept, dropped)))
            if 1 < len(shares) <= CATEGORIES:
                bars = [(tx.plain(name), n / of, f"{n} of {of}") for name, n, of in shares]
                title = f"{run.name}: kept share of each category"
                panels.append((title, drawn_bars(f"curate{i}-categories", bars, tx.plain(title))))
        if len(shares) > (CATEGORIES if figures else 1):
            lines = [[name, f"{n} of {of}", percent(n / of)] for name, n, of in shares]
            label = f"{run.name}: kept rows of each category"
            tables.append(tx.cut_table(label, ["category", "kept", "share"], lines, "categories"))
        if not figures:
            lines = [
                [name, f"{len(part):,}", *(f"{value:.4g}" for value in (min(part), median(part), max(part)))]
                for name, part in (("kept", kept), ("not kept", dropped)) if part
            ]  # fmt: skip
            tables.append(Table(f"{run.name}: scores", ["rows", "number", "lowest", "median", "highest"], lines))
        if i < SHOWN:
            tables += _corrupted(run, scored) + _repeated(run, scored)
            order = sorted(scored, key=lambda r: (r.get("rank") or 0, r.get("row") or 0))
            high, low = order[:ENDS], order[ENDS:][-ENDS:]
            columns = [("The highest scores", high), ("The lowest scores", low)]
            samples = [{"title": t, "samples": [_row(r, len(scored)) for r in part]} for t, part in columns]
            outputs.append({"title": f"{run.name}: rows by score", "columns": samples})
    note, left = "Every row with its score, rank and reason is in the run's scores.jsonl.", len(runs) - SHOWN
    note += f" The rows of {left:,} more curation runs are not shown." if left > 0 else ""
    title = "Which rows were kept"
    return [Section(title, ABOUT, cut(points), panels, tables=tables, outputs=outputs, note=note, titled=True)]


def _chose(run: Run, rows: list[dict]) -> str:
    """The sentence on one curation run."""
    info, options = run.info, run.info.get("config") or {}
    total, kept = tx.rows_of(run, "alignment") or len(rows), info.get("kept") or 0
    dropped = ", ".join(f"{why} {n:,}" for why, n in (info.get("dropped") or {}).items()) or "nothing"
    text = f"{run.name} ({info.get('method')}) kept {kept:,} of {total:,} rows ({percent(kept / max(total, 1))}). "
    text += f"Not kept: {dropped}."
    if score := info.get("score"):
        text += f" Its score: {score[0].lower()}{score[1:]}."
    passes = info.get("passes") or {}
    cost = [f"{passes[k]:.3g} {k}" for k in ("forward", "backward") if passes.get(k)]
    if (took := info.get("seconds_scoring")) is not None:
        text += f" Scoring took {as_time(took)}, "
        text += f"passes per row: {' and '.join(cost)}." if cost else "without a model."
    if agreed := info.get("agreement"):
        text += f" Its ranks agree with those of {options.get('target_model')} with a Spearman correlation of "
        text += f"{tx.decimals(agreed.get('spearman'), 2)}; of the rows kept by one, "
        text += f"{percent(agreed['kept_by_both'])} are kept by both."
    if not any(r.get("category") for r in rows):
        text += " The rows have no categories."
    return text


def _by_category(rows: list[dict]) -> list[tuple[str, int, int]]:
    """(category, rows kept, rows), the largest share first; empty if no row has a category."""
    total = Counter(str(r.get("category") or "none") for r in rows)
    kept = Counter(str(r.get("category") or "none") for r in rows if r.get("kept"))
    shares = [(name, kept[name], of) for name, of in total.items()]
    return sorted(shares, key=lambda f: (-f[1] / f[2], f[0])) if any(r.get("category") for r in rows) else []


def _corrupted(run: Run, rows: list[dict]) -> list[Table]:
    """How many of the rows that were corrupted on purpose, as `corruption` says, were kept."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(tx.as_words(row.get("corruption") or ""), []).append(row)
    sound = kinds.pop("", [])
    if not kinds or not sound:
        return []
    from scipy.stats import mannwhitneyu

    if len(kinds) > 1:
        kinds["any of these"] = [row for part in kinds.values() for row in part]
    lines = [["intact", f"{len(sound):,}", percent(fmean(bool(row.get("kept")) for row in sound)), "", ""]]
    for kind, part in kinds.items():
        test = mannwhitneyu([row["score"] for row in sound], [row["score"] for row in part])
        kept, above = fmean(bool(row.get("kept")) for row in part), test.statistic / (len(sound) * len(part))
        lines.append([kind, f"{len(part):,}", percent(kept), percent(above), tx.as_p(test.pvalue)])
    columns = ["rows", "number", "kept", "pairs where an intact row scores higher", "p"]
    return [Table(f"{run.name}: rows corrupted on purpose", columns, lines, CORRUPTED)]


def _repeated(run: Run, rows: list[dict]) -> list[Table]:
    """Rows that were dropped because they repeat another, with that row."""
    known = {str(r.get("row")): [_place(r), tx.as_words(r.get("prompt"))] for r in rows}
    lines = []
    for r in sorted(rows, key=lambda r: r.get("row") or 0):
        reason, _, other = str(r.get("why") or "").partition(" of row ")
        if other:
            lines.append([reason, _place(r), tx.as_words(r.get("prompt")), *known.get(other, [other, ""])])
    label = f"{run.name}: repeated prompts"
    table = tx.cut_table(label, ["dropped as", "at", "prompt", "of the one at", "prompt"], lines, "rows", ROWS)
    return [table] if lines else []


def _place(row: dict) -> str:
    """Where a row came from: file and line, without the folder."""
    return tx.as_words(row.get("place") or f"row {row.get('row')}").rpartition("/")[2]


def _row(row: dict, total: int) -> dict[str, Any]:
    """A row of the data in the form of a model's output."""
    kept = "kept" if row.get("kept") else str(row.get("why") or "not kept")
    return {
        "kind": f"rank {row.get('rank')} of {total:,}", "category": str(row.get("category") or ""),
        "prompt": tx.as_text(row.get("prompt")), "response": tx.as_text(row.get("chosen")),
        "marks": [("score", f"{row['score']:.4g}", None), ("row", kept, None)], "degenerate": False, "split": False,
    }  # fmt: skip
