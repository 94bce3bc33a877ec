"""What the page says of a customer's job that was screened, and of where attention sinks."""

from __future__ import annotations

from typing import Any

from tunevax.evidence.words import percent
from tunevax.records import SCREEN, SINK
from tunevax.report.blocks import PANELS, Section, Table, cut
from tunevax.report.provenance import Provenance, Run
from tunevax.report.text import (
    NONE,
    decimals,
    ends_of,
    is_number,
    json_of,
    lines_of,
    listed,
    model_of,
    plain,
    rows_of,
    runs_of,
    spread,
)

ENDS = 3  # rows of the highest and of the lowest score
ROWS = 12  # rows of a table of examples
LINES = 40  # rows of any other table
DRAWN = 600  # markers of each kind in a scatter
STRONGEST = 8  # heads named


def summary(run: Run) -> str:
    """What the run did, in a sentence."""
    info, screened = run.info, run.info.get("screen") or {}
    if info.get("verb") == "analyze":
        models = json_of(run, SINK).get("models") or []
        heads = " and ".join(f"{m['positive_heads']} of {m['heads']} in {m['label']}" for m in models)
        return f"{run.name}: measured the sink divergence of each head; positive are {heads}."
    text = (
        f"{run.name}: {info.get('method')} on {model_of(run)}, {info.get('steps', 0):,} steps of a customer's job of "
    )
    text += f"{rows_of(run, 'task'):,} rows"
    if screened:
        flagged, dropped = screened.get("flagged", 0), screened.get("dropped", 0)
        text += f"; data screening flagged {flagged:,} rows and dropped {dropped:,}"
    return text + "."


def measured(run: Run) -> dict[str, Any]:
    """What the run's files hold."""
    return {"screen": lines_of(run, SCREEN), "sink": json_of(run, SINK)}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """On screening, and on where attention sinks."""
    jobs, analyses = (runs_of(provenance.behind, verb) for verb in ("finetune", "analyze"))
    screened = [run for run in jobs if run.info.get("screen")]
    return [s for s in (_screening(screened, figures), _sinks(analyses, figures)) if s]


def _screening(runs: list[Run], figures: bool) -> Section | None:
    """What the screens found; None without a run."""
    if not runs:
        return None
    panels: list[tuple[str, str]] = []
    points, lines, left = [], [], 0
    for i, run in enumerate(runs):
        points.append(_screened(run))
        limits = run.info["screen"].get("thresholds") or {}
        rows = [r for r in lines_of(run, SCREEN) if all(is_number(r.get(k)) for k in limits)]
        if len(limits) != 2 or not rows:
            continue
        (x, x_limit), (y, y_limit) = limits.items()
        if figures and len(panels) < PANELS:
            from tunevax.report import charts as fig

            places = [(float(r[x]), float(r[y]), bool(r.get("flagged"))) for r in rows]
            drawn = [p for side in (False, True) for p in spread([p for p in places if p[2] == side], DRAWN)]
            more = "" if len(drawn) == len(places) else f", {len(drawn):,} of {len(places):,} rows"
            title = f"{run.name}: the two scores of each row of the job{more}"
            labels = f"{x} score", f"{y} score"
            panels.append((title, fig.scatter(f"screen{i}", plain(title), drawn, (x_limit, y_limit), labels)))

        def above(row: dict, limits: dict[str, float] = limits) -> tuple:
            return -len(row.get("flagged") or []), -max(row[k] - limits[k] for k in limits)

        rows.sort(key=above)
        flagged = sum(bool(r.get("flagged")) for r in rows)
        shown = rows[: min(ROWS, flagged + ENDS)]
        left += max(0, flagged - ROWS)
        lines += [
            [run.name, str(r.get("place") or NONE).rsplit("/", 1)[-1], decimals(r[x], 2), decimals(r[y], 2),
             listed(r.get("flagged") or []) or "not flagged", str(r.get("done") or NONE)]
            for r in shown
        ]  # fmt: skip
    columns = ["run", "row", "gradient", "refusal", "flagged by", "what was done"]
    note = f"{left:,} more flagged rows are not shown; --format json has them all." if left else ""
    return Section(
        "Data screening",
        "Before training, every row of the customer's job got two scores: how far training on it is training on "
        "harmful answers (gradient), and how far its prompt is where harmful prompts are (refusal; 0 is the average "
        "row of the job, 1 the average harmful prompt). A row at or above either threshold is flagged."
        + figures
        * " Filled diamonds are flagged, hollow circles are not; the dotted lines are the thresholds.",
        points=cut(points),
        panels=panels,
        tables=[Table("The rows that look most like an attack", columns, lines, note)] if lines else [],
    )


def _screened(run: Run) -> str:
    """The sentence on one screen."""
    found = run.info["screen"]
    by = ", ".join(f"{n:,} by the {name} score" for name, n in (found.get("flagged_by") or {}).items())
    limits = ", ".join(f"{name} {decimals(value, 2)}" for name, value in (found.get("thresholds") or {}).items())
    rows, flagged, dropped = (found.get(k) or 0 for k in ("rows", "flagged", "dropped"))
    text = f"{run.name} ({run.info.get('method')}): {flagged:,} of {rows:,} rows of the job are flagged"
    text += f" ({by}; thresholds: {limits}). " if flagged else f" (thresholds: {limits}). "
    text += f"{dropped:,} were dropped before training." if dropped else "None was dropped: all were trained on."
    set_on = found.get("calibration") or {}
    reached = {k: v for k, v in (set_on.get("harmful_at_threshold") or {}).items() if is_number(v)}
    if set_on.get("rows") and reached:
        shares = " and ".join(f"{percent(share)} reach that of the {name} score" for name, share in reached.items())
        text += f" The thresholds were set on {set_on['rows']:,} known harmful rows: {shares}, by choice. How many "
        text += "harmful rows of a job they find is not known, nor how many of this customer's harmless rows they flag."
    return text


def _sinks(runs: list[Run], figures: bool) -> Section | None:
    """Sink divergence by head; None without an analysis."""
    contents = [(run, json_of(run, SINK)) for run in runs]
    contents = [(run, c) for run, c in contents if c.get("models")]
    if not contents:
        return None
    panels: list[tuple[str, str]] = []
    points, lines, strongest = [], [], []
    sizes = sorted(abs(v) for _, c in contents for m in c["models"] for layer in m["d"] for v in layer)
    top = sizes[int(0.95 * (len(sizes) - 1))] or 1.0  # so that one head does not leave all others pale
    judge = _judge([m for _, c in contents for m in c["models"]])
    points_of: dict[tuple, tuple[str, int, float]] = {}
    for i, (run, content) in enumerate(contents):
        models = content["models"]
        points.append(_compared(run, content))
        for j, m in enumerate(models):
            score = (m.get("scores") or {}).get(judge)
            if score:
                value = float(score["value"])
                points_of.setdefault(
                    (m["label"], m["positive_heads"], value), (plain(m["label"]), m["positive_heads"], value)
                )
            told_score = f"{percent(score['value'])} [{ends_of(score)}]" if score else NONE
            over = "all tokens" if content.get("sink_queries", "all") == "all" else "positions both have"
            heads = f"{m['positive_heads']} of {m['heads']}"
            lines.append([run.name, m["label"], over, heads, f"{m['R']:.2g}", told_score])
            positive = {(x, y): d for x, layer in enumerate(m["d"]) for y, d in enumerate(layer) if d > 0}
            best = sorted(positive, key=lambda at: (-positive[at], at))[:STRONGEST]
            strongest.append(
                [run.name, m["label"], ", ".join(f"{x}.{y} ({positive[x, y]:.2g})" for x, y in best) or "none"]
            )
            if figures and len(panels) < PANELS:
                from tunevax.report import charts as fig

                when = (" (before)", " (after)")[j] if len(models) == 2 else ""
                title = f"{m['label']}{when}: {m['positive_heads']} of {m['heads']} heads are positive"
                told = f"Largest divergence in layer.head {strongest[-1][2]}."
                scale = f"head (fullest colour: {top:.2g} and beyond)"
                svg = fig.head_map(f"sink{i}-{j}", plain(title), m["d"], set(positive), 0.0, top, scale, told)
                panels.append((title, svg))
    if figures and judge and len(points_of) > 2 and len({m["heads"] for _, c in contents for m in c["models"]}) == 1:
        from tunevax.report import charts as fig

        title = f"Positive heads against harmful answers, by {judge.partition('/')[2]}"
        panels.append((title, fig.heads_and_harm("sink-harm", title, list(points_of.values())[:PANELS])))
    columns = [
        "run",
        "analysed",
        "averaged over",
        "positive heads",
        "mean of the positive parts",
        f"harmful, by {judge.partition('/')[2]}",
    ]
    if not judge:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return Section(
        "Where attention sinks",
        "The sink divergence of a head: how much more of its attention goes to the first token on harmful answers than "
        "on refusals to the same prompts. The observation behind it (arXiv 2602.05228) is that heads where it is "
        "positive grow in number as a model turns harmful."
        + figures
        * " Orange with a dot is positive, blue without is negative; all maps have one scale.",
        points=cut(points),
        panels=panels,
        tables=[
            Table("Heads and harm", columns, lines[:LINES]),
            Table("The most positive heads, as layer.head", ["run", "analysed", "heads"], strongest[:LINES]),
        ],
        titled=True,
    )


def _compared(run: Run, content: dict) -> str:
    """The sentence on one analysis."""
    models = content["models"]
    counts = [f"{m['label']} has {m['positive_heads']} of {m['heads']} heads with positive divergence" for m in models]
    text = f"{run.name}: over {content.get('pairs')} pairs of answers, {' and '.join(counts)}"
    if len(models) == 2 and len({m["heads"] for m in models}) == 1:
        pairs = [
            (a > 0, b > 0)
            for x, y in zip(models[0]["d"], models[1]["d"], strict=False)
            for a, b in zip(x, y, strict=False)
        ]
        text += (
            f"; {sum(not a and b for a, b in pairs)} turned positive, {sum(a and not b for a, b in pairs)} ceased to be"
        )
    return text + "."


def _judge(models: list[dict]) -> str:
    """The first judge whose score every scored model has, or ''."""
    scores = [m["scores"] for m in models if m.get("scores")]
    return next(
        (k for k in (scores[0] if scores else {}) if k.startswith("harmful/") and all(k in s for s in scores)), ""
    )
