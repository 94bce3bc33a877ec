"""The sections of a report on the screening of a customer's job, and on attention sinks."""

from __future__ import annotations

from typing import Any

from tunevax.evidence.words import percent
from tunevax.records import SCREEN, SINK
from tunevax.report import charts as fig
from tunevax.report import text as tx
from tunevax.report.blocks import PANELS, Section, Table, cut
from tunevax.report.provenance import Provenance, Run
from tunevax.report.text import NONE

ENDS = 3  # rows below the threshold
ROWS = 12  # rows of a table of examples
DRAWN = 600  # markers of each kind in a scatter
STRONGEST = 8  # heads named


def summary(run: Run) -> str:
    """A sentence on the run."""
    info, screened = run.info, run.info.get("screen") or {}
    if info.get("verb") == "analyze":
        models = tx.json_of(run, SINK).get("models") or []
        heads = " and ".join(f"{m['positive_heads']} of {m['heads']} in {m['label']}" for m in models)
        return f"{run.name}: measured the sink divergence of each head; it is positive in {heads}."
    text = f"{run.name}: {info.get('method')} on {tx.model_of(run)}, {info.get('steps', 0):,} steps of a customer's "
    text += f"job of {tx.rows_of(run, 'task'):,} rows"
    if screened:
        flagged, dropped = screened.get("flagged", 0), screened.get("dropped", 0)
        text += f"; data screening flagged {flagged:,} rows and dropped {dropped:,}"
    return text + "."


def measured(run: Run) -> dict[str, Any]:
    """The content of the run's files."""
    return {"screen": tx.lines_of(run, SCREEN), "sink": tx.json_of(run, SINK)}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """On screening, and on where attention sinks."""
    jobs, analyses = (tx.runs_of(provenance.behind, verb) for verb in ("finetune", "analyze"))
    screened = [run for run in jobs if run.info.get("screen")]
    return [s for s in (_screening(screened, figures), _sinks(analyses, figures)) if s]


def _screening(runs: list[Run], figures: bool) -> Section:
    points, lines, left = [], [], 0
    panels: list[tuple[str, str]] = []
    for i, run in enumerate(runs):
        points.append(_screened(run))
        limits = run.info["screen"].get("thresholds") or {}
        rows = [r for r in tx.lines_of(run, SCREEN) if all(tx.is_number(r.get(k)) for k in limits)]
        if len(limits) != 2 or not rows:
            continue
        (x, x_limit), (y, y_limit) = limits.items()
        if figures and len(panels) < PANELS:
            places = [(float(r[x]), float(r[y]), bool(r.get("flagged"))) for r in rows]
            drawn = [p for side in (False, True) for p in tx.spread([p for p in places if p[2] == side], DRAWN)]
            more = "" if len(drawn) == len(places) else f", {len(drawn):,} of {len(places):,} rows"
            title, both = f"{run.name}: the two scores of each row of the job{more}", (x_limit, y_limit)
            svg = fig.scatter(f"screen{i}", tx.plain(title), drawn, both, (f"{x} score", f"{y} score"))
            panels.append((title, svg))
        suspicion = [(len(r.get("flagged") or []), max(r[x] - x_limit, r[y] - y_limit)) for r in rows]
        rows = [rows[i] for i in sorted(range(len(rows)), key=suspicion.__getitem__, reverse=True)]
        flagged = sum(bool(r.get("flagged")) for r in rows)
        left += max(0, flagged - ROWS)
        lines += [
            [run.name, str(r.get("place") or NONE).rsplit("/", 1)[-1], tx.decimals(r[x], 2), tx.decimals(r[y], 2),
             tx.listed(r.get("flagged") or []) or "not flagged", str(r.get("done") or NONE)]
            for r in rows[: min(ROWS, flagged + ENDS)]
        ]  # fmt: skip
    columns = ["run", "row", "gradient", "refusal", "flagged by", "what was done"]
    note = f"{left:,} more flagged rows are not shown; --format json has them all." if left else ""
    about = "Before training, every row of the customer's job got two scores: how similar its gradient is to that of "
    about += "harmful answers (gradient), and how similar its prompt is to harmful prompts (refusal; 0 is the average "
    about += "row of the job, 1 the average harmful prompt). A row at or above either threshold is flagged."
    about += figures * " Filled diamonds are flagged, hollow circles are not; the dotted lines are the thresholds."
    tables = [Table("The rows that look most like an attack", columns, lines, note)] if lines else []
    return Section("Data screening", about, points=cut(points), panels=panels, tables=tables)


def _screened(run: Run) -> str:
    screen = run.info["screen"]
    by = ", ".join(f"{n:,} by the {name} score" for name, n in (screen.get("flagged_by") or {}).items())
    limits = ", ".join(f"{name} {tx.decimals(value, 2)}" for name, value in (screen.get("thresholds") or {}).items())
    rows, flagged, dropped = (screen.get(k) or 0 for k in ("rows", "flagged", "dropped"))
    text = f"{run.name} ({run.info.get('method')}): {flagged:,} of {rows:,} rows of the job are flagged"
    text += f" ({by}; thresholds: {limits}). " if flagged else f" (thresholds: {limits}). "
    text += f"{dropped:,} were dropped before training." if dropped else "None was dropped: all were trained on."
    set_on = screen.get("calibration") or {}
    reached = {k: v for k, v in (set_on.get("harmful_at_threshold") or {}).items() if tx.is_number(v)}
    if set_on.get("rows") and reached:
        shares = " and ".join(f"{percent(share)} reach that of the {name} score" for name, share in reached.items())
        text += f" The thresholds were set on {set_on['rows']:,} known harmful rows: {shares}, by choice. Which share "
        text += "of the harmful rows of a job they flag is unknown, as is the share of this customer's harmless rows."
    return text


def _sinks(runs: list[Run], figures: bool) -> Section | None:
    contents = [(run, content) for run in runs if (content := tx.json_of(run, SINK)).get("models")]
    models = [m for _, content in contents for m in content["models"]]
    if not models:
        return None
    points, lines, strongest = [], [], []
    panels: list[tuple[str, str]] = []
    sizes = sorted(abs(v) for m in models for layer in m["d"] for v in layer)
    top = sizes[int(0.95 * (len(sizes) - 1))] or 1.0  # an outlier would make all others pale
    scored = [m["scores"] for m in models if m.get("scores")]
    shared = [name for name in (scored[0] if scored else {}) if all(name in scores for scores in scored)]
    judge = next((name for name in shared if name.startswith("harmful/")), "")  # whose score every scored model has
    harm: dict[tuple, None] = {}  # (model, positive heads, harmful score), each once
    for i, (run, content) in enumerate(contents):
        points.append(_compared(run, content))
        for j, m in enumerate(content["models"]):
            score, heads = (m.get("scores") or {}).get(judge), f"{m['positive_heads']} of {m['heads']}"
            if score:
                harm[tx.plain(m["label"]), m["positive_heads"], float(score["value"])] = None
            over = "all tokens" if content.get("sink_queries", "all") == "all" else "positions both have"
            harmful = [f"{percent(score['value'])} [{tx.ends_of(score)}]" if score else NONE] if judge else []
            lines.append([run.name, m["label"], over, heads, f"{m['R']:.2g}", *harmful])
            positive = {(x, y): d for x, layer in enumerate(m["d"]) for y, d in enumerate(layer) if d > 0}
            best = sorted(positive, key=lambda at: (-positive[at], at))[:STRONGEST]
            named = ", ".join(f"{x}.{y} ({positive[x, y]:.2g})" for x, y in best) or "none"
            strongest.append([run.name, m["label"], named])
            if figures and len(panels) < PANELS:
                when = (" (before)", " (after)")[j] if len(content["models"]) == 2 else ""
                title, scale = f"{m['label']}{when}: {heads} heads are positive", f"fullest colour: {top:.2g} or more"
                rest = m["d"], set(positive), 0.0, top, f"head ({scale})", f"Largest divergence in layer.head {named}."
                panels.append((title, fig.head_map(f"sink{i}-{j}", tx.plain(title), *rest)))
    columns = ["run", "analysed", "averaged over", "positive heads", "mean of the positive parts"]
    if judge:
        columns.append(f"harmful, by {judge.partition('/')[2]}")
        if figures and len(harm) > 2 and len({m["heads"] for m in models}) == 1:
            title = f"Positive heads against harmful answers, by {judge.partition('/')[2]}"
            panels.append((title, fig.heads_and_harm("sink-harm", title, list(harm)[:PANELS])))
    about = "The sink divergence of a head: how much more of its attention goes to the first token on harmful answers "
    about += "than on refusals to the same prompts. According to arXiv 2602.05228, the number of heads where it is "
    about += "positive grows as a model turns harmful."
    about += figures * " Orange with a dot is positive, blue without is negative; all maps have one scale."
    most = Table("The most positive heads, as layer.head", ["run", "analysed", "heads"], strongest[: tx.LINES])
    tables = [Table("Heads and harm", columns, lines[: tx.LINES]), most]
    return Section("Where attention sinks", about, points=cut(points), panels=panels, tables=tables, titled=True)


def _compared(run: Run, content: dict) -> str:
    models = content["models"]
    counts = [f"{m['label']} has {m['positive_heads']} of {m['heads']} heads with positive divergence" for m in models]
    text = f"{run.name}: over {content.get('pairs')} pairs of answers, {' and '.join(counts)}"
    if len(models) == 2 and len({m["heads"] for m in models}) == 1:
        before, after = ([d > 0 for layer in m["d"] for d in layer] for m in models)
        change = [b - a for a, b in zip(before, after, strict=False)]
        text += f"; {change.count(1)} turned positive, {change.count(-1)} ceased to be"
    return text + "."
