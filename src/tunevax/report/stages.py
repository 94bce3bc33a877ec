"""What the stages around an attack recorded: rows chosen, a customer's job screened, heads analysed, models restored.

Read from run folders alone. Every section stands on a page only if one of its runs was given or is behind one.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tunevax.audit.findings import percent
from tunevax.audit.results import read_json_lines
from tunevax.data.splits import prompt_text
from tunevax.errors import UsageError
from tunevax.report.page import PANELS, Section, _cut, visible
from tunevax.report.provenance import Provenance, Run, seconds
from tunevax.report.tables import NONE, Table

ENDS = 3  # rows of the highest and of the lowest score
SHOWN = 4  # curation runs whose rows are shown
CATEGORIES = 14  # bars at most; with more a table
ROWS = 12  # rows of a table of examples
LINES = 40  # rows of any other table
DRAWN = 600  # markers of each kind in a scatter
HEADS = 512  # layers, and heads of a layer, that a map can show
STRONGEST = 8  # heads named
WORDS = 160  # characters of a prompt in a table
MEASURES = ("harmful/", "over-refusal", "task/exact", "utility/", "degenerate")
SCORE = ("row", "place", "category", "score", "rank", "kept", "why")  # of a row of scores.jsonl, without its text
LOCKS = {"extract-lock": "a safety lock", "convert-lock": "a published safety lock, converted,"}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """The sections of the stages among the runs; without `figures` for a form that cannot show them."""
    behind = provenance.behind
    restored = {method: _of(behind, "restore", method) for method in ("safe-lora", "antidote")}
    locks = [run for run in _of(behind, "restore") if run.info.get("method") not in restored]
    return [
        section
        for section in (
            _curation(_of(behind, "curate"), behind, provenance.inputs, figures),
            _screening([run for run in _of(behind, "finetune") if run.info.get("screen")], figures),
            _sinks([run for run in behind if run.info.get("verb") == "analyze"], figures),
            _locks(locks, figures),
            _projected(restored["safe-lora"]),
            _pruned(restored["antidote"]),
        )
        if section
    ]


def told(provenance: Provenance) -> list[str]:
    """What each of the given runs did, in a sentence."""
    return [_did(run) for run in provenance.runs if not run.measures]


def scored(provenance: Provenance) -> bool:
    """Whether a choice of strength or an analysis among the runs scored a model."""
    return any(
        any(point.get("scores") for point in _json(run, name).get(key) or [])
        for run in provenance.behind
        for name, key in (("strength.json", "curve"), ("sink.json", "models"))
    )


def as_dict(provenance: Provenance) -> dict[str, Any]:
    """What the stages measured, by run folder, without the text of rows."""
    found: dict[str, Any] = {}
    for run in provenance.behind:
        scores = [{k: v for k, v in row.items() if k in SCORE} for row in _lines(run, "scores.jsonl")]
        parts = {"scores": scores, "screen": _lines(run, "screen.jsonl")}
        parts |= {"sink": _json(run, "sink.json"), "strength": _json(run, "strength.json")}
        if any(parts.values()):
            found[str(run.path)] = {k: _finite(v) for k, v in parts.items() if v}
    return found


# --------------------------------------------------------------------------------------------------- curation


def _curation(runs: list[Run], behind: list[Run], taken: dict[Path, list[Run]], figures: bool) -> Section | None:
    if not runs:
        return None
    rows = {run.path: [r for r in _lines(run, "scores.jsonl") if _is_number(r.get("score"))] for run in runs}
    used: dict[Path, list[str]] = {run.path: [] for run in runs}
    for run in behind:
        for made in taken.get(run.path, []):
            used.get(made.path, []).append(run.name)
    points, panels, tables, outputs = [], [], [], []
    for i, run in enumerate(runs):
        found = rows[run.path]
        points.append(_chose(run, found) + (f" Trained on them: {_list(used[run.path])}." if used[run.path] else ""))
        if not found:
            continue
        shares = _by_category(found)
        if figures and len(panels) < PANELS:
            from tunevax.report import figures as fig

            kept, dropped = (
                [float(r["score"]) for r in found if bool(r.get("kept")) == side] for side in (True, False)
            )
            title = f"{run.name}: scores of the rows"
            panels.append((title, fig.histogram(f"curate{i}-scores", _plain(title), kept, dropped)))
            if 1 < len(shares) <= CATEGORIES:
                bars = [(_plain(name), kept / of, f"{kept} of {of}") for name, kept, of in shares]
                title = f"{run.name}: kept share of each category"
                panels.append((title, fig.bars(f"curate{i}-categories", bars, _plain(title))))
        if len(shares) > (CATEGORIES if figures else 1):
            lines = [[name, f"{kept} of {of}", percent(kept / of)] for name, kept, of in shares]
            label = f"{run.name}: kept rows of each category"
            tables.append(_cut_table(label, ["category", "kept", "share"], lines, "categories"))
        if not figures:
            tables.append(_quantiles(run, found))
        if i < SHOWN:
            tables += _caught(run, found)
            order = sorted(found, key=lambda r: (r.get("rank") or 0, r.get("row") or 0))
            high, low = order[:ENDS], order[ENDS:][-ENDS:]
            columns = [("The highest scores", high), ("The lowest scores", low)]
            outputs.append(
                {
                    "title": f"{run.name}: what the score says of rows",
                    "columns": [{"title": t, "samples": [_row(r, len(found)) for r in part]} for t, part in columns],
                }
            )
    left = len(runs) - SHOWN
    return Section(
        "Which rows were kept",
        "A selector scored every row of the alignment data and the best were kept, before any alignment method saw "
        "them. A score is the selector's opinion: higher is what it would rather keep.",
        points=_cut(points),
        panels=panels,
        tables=tables,
        outputs=outputs,
        note=f"The rows of {left:,} more curation runs are not shown." if left > 0 else "",
        titled=True,
    )


def _chose(run: Run, rows: list[dict]) -> str:
    """The sentence on one curation run."""
    info, options = run.info, run.info.get("config") or {}
    total, kept = _rows_of(run, "alignment") or len(rows), info.get("kept") or 0
    dropped = ", ".join(f"{why} {n:,}" for why, n in (info.get("dropped") or {}).items()) or "nothing"
    text = f"{run.name} ({info.get('method')}) kept {kept:,} of {total:,} rows ({percent(kept / max(total, 1))}). "
    text += f"Not kept: {dropped}."
    passes = info.get("passes") or {}
    cost = [f"{passes[k]:.3g} {k}" for k in ("forward", "backward") if passes.get(k)]
    took = info.get("seconds_scoring")
    if took is not None:
        cost = " and ".join(cost)
        text += f" Scoring took {_time(took)}, " + (f"passes per row: {cost}." if cost else "without a model.")
    if agreed := info.get("agreement"):
        text += f" With {options.get('target_model')} its ranks agree with a Spearman correlation of "
        text += (
            f"{_decimals(agreed.get('spearman'), 2)}; of the rows kept by one, {percent(agreed['kept_by_both'])} are "
        )
        text += "kept by both."
    if not any(r.get("category") for r in rows):
        text += " The rows have no categories."
    return text


def _by_category(rows: list[dict]) -> list[tuple[str, int, int]]:
    """(category, rows kept, rows), the largest share first; empty if no row has a category."""
    names = [str(r.get("category") or "none") for r in rows]
    total, kept = Counter(names), Counter(name for name, r in zip(names, rows, strict=True) if r.get("kept"))
    found = [(name, kept[name], of) for name, of in total.items()]
    return sorted(found, key=lambda f: (-f[1] / f[2], f[0])) if any(r.get("category") for r in rows) else []


def _quantiles(run: Run, rows: list[dict]) -> Table:
    """The histogram, for a form without figures."""
    lines = []
    for name, side in (("kept", True), ("not kept", False)):
        found = [float(r["score"]) for r in rows if bool(r.get("kept")) == side]
        if found:
            told = [min(found), statistics.median(found), max(found)]
            lines.append([name, f"{len(found):,}", *(f"{value:.4g}" for value in told)])
    return Table(f"{run.name}: scores", ["rows", "number", "lowest", "median", "highest"], lines)


def _caught(run: Run, rows: list[dict]) -> list[Table]:
    """Rows dropped for another reason than their rank, with the row they repeat."""
    texts = {r.get("row"): _words(r.get("prompt")) for r in rows}
    lines = []
    for r in sorted(rows, key=lambda r: r.get("row") or 0):
        reason, _, other = str(r.get("why") or "").partition(" of row ")
        if other:
            lines.append([reason, _words(r.get("prompt")), texts.get(int(other) if other.isdigit() else None, other)])
    label = f"{run.name}: repeated prompts"
    table = _cut_table(label, ["dropped as", "prompt", "of the prompt"], lines, "rows", ROWS)
    return [table] if lines else []


def _row(row: dict, total: int) -> dict[str, Any]:
    """A row of the data as the page shows a model's output."""
    kept = "kept" if row.get("kept") else str(row.get("why") or "not kept")
    return {
        "kind": f"rank {row.get('rank')} of {total:,}",
        "category": str(row.get("category") or ""),
        "prompt": _text(row.get("prompt")),
        "response": _text(row.get("chosen")),
        "marks": [("score", f"{row['score']:.4g}", None), ("row", kept, None)],
        "degenerate": False,
        "split": False,
    }


# -------------------------------------------------------------------------------------------------- screening


def _screening(runs: list[Run], figures: bool) -> Section | None:
    if not runs:
        return None
    points, panels, lines, left = [], [], [], 0
    for i, run in enumerate(runs):
        points.append(_screened(run))
        limits = run.info["screen"].get("thresholds") or {}
        rows = [r for r in _lines(run, "screen.jsonl") if all(_is_number(r.get(k)) for k in limits)]
        if len(limits) != 2 or not rows:
            continue
        (x, x_limit), (y, y_limit) = limits.items()
        if figures and len(panels) < PANELS:
            from tunevax.report import figures as fig

            places = [(float(r[x]), float(r[y]), bool(r.get("flagged"))) for r in rows]
            drawn = [p for side in (False, True) for p in _spread([p for p in places if p[2] == side], DRAWN)]
            more = "" if len(drawn) == len(places) else f", {len(drawn):,} of {len(places):,} rows"
            title = f"{run.name}: the two scores of each row of the job{more}"
            labels = f"{x} score", f"{y} score"
            panels.append((title, fig.scatter(f"screen{i}", _plain(title), drawn, (x_limit, y_limit), labels)))

        def above(row: dict, limits: dict[str, float] = limits) -> tuple:
            return -len(row.get("flagged") or []), -max(row[k] - limits[k] for k in limits)

        rows.sort(key=above)
        flagged = sum(bool(r.get("flagged")) for r in rows)
        shown = rows[: min(ROWS, flagged + ENDS)]
        left += max(0, flagged - ROWS)
        lines += [
            [run.name, str(r.get("place") or NONE).rsplit("/", 1)[-1], _decimals(r[x], 2), _decimals(r[y], 2),
             _list(r.get("flagged") or []) or "not flagged", str(r.get("done") or NONE)]
            for r in shown
        ]  # fmt: skip
    columns = ["run", "row", "gradient", "refusal", "flagged by", "what was done"]
    note = f"{left:,} more flagged rows are not shown; --format json has them all." if left else ""
    return Section(
        "Screening at the door",
        "Before training, every row of the customer's job got two scores: how far training on it is training on "
        "harmful answers (gradient), and how far its prompt is where harmful prompts are (refusal; 0 is the average "
        "row of the job, 1 the average harmful prompt). A row at or above either threshold is flagged."
        + figures
        * " Filled diamonds are flagged, hollow circles are not; the dotted lines are the thresholds.",
        points=_cut(points),
        panels=panels,
        tables=[Table("The rows that look most like an attack", columns, lines, note)] if lines else [],
    )


def _screened(run: Run) -> str:
    """The sentence on one screen."""
    found = run.info["screen"]
    by = ", ".join(f"{n:,} by the {name} score" for name, n in (found.get("flagged_by") or {}).items())
    limits = ", ".join(f"{name} {_decimals(value, 2)}" for name, value in (found.get("thresholds") or {}).items())
    rows, flagged, dropped = (found.get(k) or 0 for k in ("rows", "flagged", "dropped"))
    text = f"{run.name} ({run.info.get('method')}): {flagged:,} of {rows:,} rows of the job are flagged"
    text += f" ({by}; thresholds: {limits}). " if flagged else f" (thresholds: {limits}). "
    text += f"{dropped:,} were dropped before training." if dropped else "None was dropped: all were trained on."
    set_on = found.get("calibration") or {}
    reached = {k: v for k, v in (set_on.get("harmful_at_threshold") or {}).items() if _is_number(v)}
    if set_on.get("rows") and reached:
        shares = " and ".join(f"{percent(share)} reach that of the {name} score" for name, share in reached.items())
        text += f" The thresholds were set on {set_on['rows']:,} known harmful rows: {shares}, by choice. How many "
        text += "harmful rows of a job they find is not known, nor how many of this customer's harmless rows they flag."
    return text


# ------------------------------------------------------------------------------------------------------ sinks


def _sinks(runs: list[Run], figures: bool) -> Section | None:
    contents = [(run, _json(run, "sink.json")) for run in runs]
    contents = [(run, c) for run, c in contents if c.get("models")]
    if not contents:
        return None
    points, panels, lines, strongest = [], [], [], []
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
                    (m["label"], m["positive_heads"], value), (_plain(m["label"]), m["positive_heads"], value)
                )
            told_score = f"{percent(score['value'])} [{_ends(score)}]" if score else NONE
            lines.append([run.name, m["label"], f"{m['positive_heads']} of {m['heads']}", f"{m['R']:.2g}", told_score])
            positive = {(x, y): d for x, layer in enumerate(m["d"]) for y, d in enumerate(layer) if d > 0}
            best = sorted(positive, key=lambda at: (-positive[at], at))[:STRONGEST]
            strongest.append(
                [run.name, m["label"], ", ".join(f"{x}.{y} ({positive[x, y]:.2g})" for x, y in best) or "none"]
            )
            if figures and len(panels) < PANELS:
                from tunevax.report import figures as fig

                when = (" (before)", " (after)")[j] if len(models) == 2 else ""
                title = f"{m['label']}{when}: {m['positive_heads']} of {m['heads']} heads are positive"
                told = f"Largest divergence in layer.head {strongest[-1][2]}."
                scale = f"head (fullest colour: {top:.2g} and beyond)"
                svg = fig.head_map(f"sink{i}-{j}", _plain(title), m["d"], set(positive), 0.0, top, scale, told)
                panels.append((title, svg))
    if figures and judge and len(points_of) > 2 and len({m["heads"] for _, c in contents for m in c["models"]}) == 1:
        from tunevax.report import figures as fig

        title = f"Positive heads against harmful answers, by {judge.partition('/')[2]}"
        panels.append((title, fig.heads_and_harm("sink-harm", title, list(points_of.values())[:PANELS])))
    columns = [
        "run",
        "analysed",
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
        points=_cut(points),
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


# ------------------------------------------------------------------------------------------------ restoration


def _locks(runs: list[Run], figures: bool) -> Section | None:
    if not runs:
        return None
    points, panels, tables = [], [], []
    known: dict[str, list[list[float]]] = {}  # what the extraction told of all heads, by the base's identity
    for run in runs:
        lock = run.info.get("lock") or {}
        if identity := (lock.get("base") or {}).get("identity"):
            known.setdefault(identity, lock.get("accuracy_of_all") or [])
    drawn = set()
    for i, run in enumerate(runs):
        points.append(_locked(run))
        lock, content = run.info.get("lock") or {}, _json(run, "strength.json")
        heads = [tuple(pair) for pair in lock.get("heads") or []]
        every = lock.get("accuracy_of_all") or known.get((lock.get("base") or {}).get("identity") or "") or []
        if heads and not figures:
            tables.append(_heads(run, heads, lock.get("accuracy") or []))
        if (
            heads
            and figures
            and len(panels) < PANELS
            and max(map(max, heads)) < HEADS
            and (tuple(heads), str(every)) not in drawn
        ):
            drawn.add((tuple(heads), str(every)))
            panels.append(_lock_map(f"lock{i}", run, lock, heads, every))
        if content.get("curve"):
            tables.append(_strengths(run, content))
            if figures and len(panels) < PANELS:
                panels.append(_strength_curve(f"strength{i}", run, content))
    return Section(
        "Safety locks",
        "A lock adds a fixed direction, from unsafe to safe, to the output of some attention heads. It repairs a "
        "fine-tune; whoever holds the weights can take it off."
        + figures
        * " Dots are the locked heads; more colour is a probe that tells safe from unsafe answers better.",
        points=_cut(points),
        panels=panels,
        tables=tables,
        titled=True,
    )


def _locked(run: Run) -> str:
    """The sentence on one run that extracted, converted or applied a lock."""
    info, lock, method = run.info, run.info.get("lock") or {}, run.info.get("method")
    heads, content = len(lock.get("heads") or []), _json(run, "strength.json")
    layers = len({x for x, _ in lock.get("heads") or []})
    where = f"{heads} heads in {layers} layer{'s' * (layers != 1)}"
    swept = ""
    if content.get("curve"):
        tried, chosen = _list([f"{point['strength']:g}" for point in content["curve"]]), content.get("chosen")
        swept = f" Of the strengths {tried}, on {content.get('prompts')} validation prompts, "
        swept += "none is within the limits." if chosen is None else f"{chosen:g} is the smallest within the limits."
    if method == "extract-lock":
        total = (lock.get("n_layers") or 0) * (lock.get("n_heads") or 0)
        text = f"{run.name} chose {heads} of {_model(run)}'s " + (f"{total} heads" if total else "heads")
        text += f" in {layers} layer{'s' * (layers != 1)}, from {lock.get('pairs')} pairs of answers and the last "
        text += f"{lock.get('r')} tokens of each; "
        text += f"{_probed(lock)}. The lock is {_bytes(lock.get('bytes'))}."
        return text
    if method == "convert-lock":
        base = (lock.get("base") or {}).get("ref") or "a base that it does not name"
        return f"{run.name} is a published lock of {where} ({lock.get('source')}), for {base}; it tells no accuracy."
    if not lock:
        return f"{run.name} put no lock on {_model(run)}.{swept}"
    form = {"stock": "a checkpoint that stock transformers loads", "run": "biases that tunevax attaches"}
    text = f"{run.name} put a lock of {where} on {_model(run)} at strength {lock.get('strength'):g}, as "
    text += f"{form.get(lock.get('form'), lock.get('form'))}: {_time(lock.get('seconds_to_apply'))} to apply, "
    text += f"{_bytes(lock.get('bytes_added'))} added"
    text += f"; {_probed(lock)}." if lock.get("accuracy") else "."
    if info.get("finding"):
        text += f" Finding: {info['finding']}."
    return text + swept


def _probed(lock: dict) -> str:
    """Accuracy of the probes, and what it is an accuracy on."""
    found = lock.get("accuracy") or []
    if not found:
        return "the accuracy of its probes is not known"
    text = f"its probes are right on {percent(min(found))} to {percent(max(found))} of tokens"
    every = [a for layer in lock.get("accuracy_of_all") or [] for a in layer]
    on = {
        "grouped": "of prompts they were not fitted to",
        "official": "by the published split, which has tokens of one answer on both sides",
    }
    text += f" {on.get(lock.get('probe'), '')}".rstrip()
    return text + (f" (all heads: {percent(min(every))} to {percent(max(every))})" if every else "")


def _heads(run: Run, heads: list[tuple[int, int]], accuracy: list[float]) -> Table:
    """The map, for a form without figures."""
    known = {at: f" ({percent(value)})" for at, value in zip(heads, accuracy, strict=False)}
    lines = [
        [str(layer), ", ".join(f"{y}{known.get((x, y), '')}" for x, y in sorted(heads) if x == layer)]
        for layer in sorted({x for x, _ in heads})
    ]
    return _cut_table(f"{run.name}: locked heads", ["layer", "heads (accuracy of the probe)"], lines, "layers")


def _lock_map(
    key: str, run: Run, lock: dict, heads: list[tuple[int, int]], every: list[list[float]]
) -> tuple[str, str]:
    from tunevax.report import figures as fig

    layers = lock.get("n_layers") or len(every) or max(x for x, _ in heads) + 1
    width = lock.get("n_heads") or (len(every[0]) if every else max(y for _, y in heads) + 1)
    cells: list[list[float | None]] = [[None] * width for _ in range(layers)]
    for (x, y), accuracy in zip(heads, lock.get("accuracy") or [], strict=False):
        cells[x][y] = accuracy
    for x, layer in enumerate(every):
        cells[x] = list(layer)
    known = [a for layer in cells for a in layer if a is not None]
    low, high = min(known, default=0.5), max(known, default=1.0)
    scale = f"head (no colour: probe right on {percent(low)}, fullest: {percent(high)})" if every else "head"
    low = low if every else 0.5  # of locked heads alone there is nothing to compare with
    per_layer = Counter(x for x, _ in heads)
    told = "Locked heads by layer: " + ", ".join(f"{x}: {n}" for x, n in sorted(per_layer.items()))
    title = f"{run.name}: {len(heads)} locked heads"
    return title, fig.head_map(key, _plain(title), cells, set(heads), low, high - low, scale, told)


def _measured(content: dict) -> list[str]:
    """The scores of a sweep that stand in its limits."""
    return [name for name in content["curve"][0].get("scores") or {} if name.startswith(MEASURES)]


def _strengths(run: Run, content: dict) -> Table:
    names = sorted(_measured(content), key=lambda n: next(i for i, m in enumerate(MEASURES) if n.startswith(m)))
    lines = []
    for point in sorted(content["curve"], key=lambda p: p["strength"]):
        scores = point.get("scores") or {}
        chosen = ", chosen" if point["strength"] == content.get("chosen") else ""
        cells = [f"{percent(scores[n]['value'])} [{_ends(scores[n])}]" if n in scores else NONE for n in names]
        lines.append([f"{point['strength']:g}{chosen}", *cells, "; ".join(point.get("misses") or []) or "nothing"])
    note, limits = "", content.get("limits") or {}
    if limits:
        harm, keys = percent(limits["harmful_target"]), ("max_utility_loss", "max_over_refusal")
        loss, refusal = (f"{100 * limits[key]:g} points" for key in keys)
        note = f"Limits: a harmful score of at most {harm} by every judge; against strength 0, over-refusal at most "
        note += f"{refusal} higher, accuracy at most {loss} lower, degenerate answers at most {loss} more."
    return Table(f"{run.name}: scores by strength", ["strength", *names, "misses the limit on"], lines, note)


def _strength_curve(key: str, run: Run, content: dict) -> tuple[str, str]:
    from tunevax.report import figures as fig

    names = sorted(_measured(content), key=lambda n: next(i for i, m in enumerate(MEASURES) if n.startswith(m)))
    points = sorted(content["curve"], key=lambda p: p["strength"])
    judges = sum(n.startswith("harmful/") for n in names)
    series = {
        _plain("harmful" if judges == 1 and n.startswith("harmful/") else n): [
            (p["strength"], p["scores"][n]) for p in points if n in p["scores"]
        ]
        for n in names
    }
    chosen = content.get("chosen")
    title = f"{run.name}: scores by strength" + ("" if chosen is None else f" (chosen: {chosen:g})")
    target = (content.get("limits") or {}).get("harmful_target", 0.0)
    return title, fig.sweep(key, _plain(title), series, target, chosen)


def _projected(runs: list[Run]) -> Section | None:
    points, tables = [], []
    for run in runs:
        rows = run.info.get("layers") or []
        cosines = [r["cosine"] for r in rows if r.get("cosine") is not None]
        taken = [r for r in rows if r.get("projected")]
        options = run.info.get("config") or {}
        aligned, base = (Path(str(run.info.get(k) or "?")).name for k in ("aligned", "base"))
        text = f"{run.name} projected {len(taken)} of {len(rows)} layers of {_model(run)} ({options.get('projector')} "
        text += f"projector) on what changed from {base} to {aligned}"
        text += f"; cosines are {min(cosines):.2f} to {max(cosines):.2f}." if cosines else "."
        if full := sum(r.get("rank") == r.get("out") for r in rows):
            text += f" In {full} layers alignment changed every direction, where the exact projector does nothing."
        points.append(text)
        marked = [(r["layer"], _decimals(r.get("cosine"), 2) + (" •" if r.get("projected") else "")) for r in rows]
        tables.append(_by_block(f"{run.name}: cosine of each layer, • where it was projected", marked))
        if options.get("projector") != "exact":
            ratio = [(r["layer"], _decimals(r.get("ratio"), 3)) for r in rows]
            tables.append(_by_block(f"{run.name}: length of the projected update, as a share of its own", ratio))
    return Section(
        "Safe LoRA",
        "The cosine between an adapter's update and its projection on what alignment changed: 1 is an update that "
        "stays within it. The layers of the lowest cosine are projected.",
        points=_cut(points),
        tables=tables,
        titled=True,
    )


def _pruned(runs: list[Run]) -> Section | None:
    points, tables = [], []
    for run in runs:
        rows, options = run.info.get("layers") or [], run.info.get("config") or {}
        left = [r["ratio"] for r in rows if r.get("ratio") is not None]
        what = "the update" if options.get("form") == "effective" else "the adapter's two factors"
        text = f"{run.name} pruned, in {len(rows)} layers of {_model(run)}, the weights of {what} that answer "
        text += f"{run.info.get('rows'):,} harmful prompts (alpha {options.get('alpha'):g})"
        text += f"; {percent(min(left))} to {percent(max(left))} of its length are left." if left else "."
        points.append(text)
        shares = [(r["layer"], f"{100 * r['pruned']:.1f} %") for r in rows]
        lengths = [(r["layer"], NONE if r.get("ratio") is None else percent(r["ratio"])) for r in rows]
        tables.append(_by_block(f"{run.name}: share of the weights pruned in each layer", shares))
        tables.append(_by_block(f"{run.name}: what is left of the length of the update", lengths))
    return Section(
        "Antidote",
        "Of the weights that the fine-tune added, those that count most on harmful answers are set to zero.",
        points=_cut(points),
        tables=tables,
        titled=True,
    )


def _by_block(label: str, cells: Sequence[tuple[str, str]]) -> Table:
    """(layer name, text) as a table, a row per block and a column per kind of layer."""
    found: dict[str, dict[str, str]] = {}
    for layer, text in cells:
        number = re.search(r"\.(\d+)\.", layer)
        found.setdefault(number[1] if number else NONE, {})[layer.rpartition(".")[2]] = text
    columns = list(dict.fromkeys(kind for row in found.values() for kind in row))
    lines = [[block, *(row.get(kind, NONE) for kind in columns)] for block, row in found.items()]
    return _cut_table(label, ["block", *columns], lines, "blocks", 2 * LINES)


# ----------------------------------------------------------------------------------------------- what they did


def _did(run: Run) -> str:
    """One run in a sentence."""
    info, verb, method = run.info, run.info.get("verb"), run.info.get("method")
    if verb == "curate":
        chosen = f"{info.get('kept', 0):,} of {_rows_of(run, 'alignment'):,} alignment rows"
        return f"{run.name}: chose {chosen} ({method})."
    if verb == "finetune":
        found = info.get("screen") or {}
        text = f"{run.name}: trained {_model(run)} on a customer's job of {_rows_of(run, 'task'):,} rows ({method}, "
        text += f"{info.get('steps', 0):,} steps)"
        if found:
            text += (
                f"; {found.get('flagged', 0):,} rows were flagged at the door and {found.get('dropped', 0):,} dropped"
            )
        return text + "."
    if verb == "align":
        return f"{run.name}: aligned {_model(run)} ({method}, {info.get('steps', 0):,} steps)."
    if verb == "analyze":
        models = _json(run, "sink.json").get("models") or []
        heads = " and ".join(f"{m['positive_heads']} of {m['heads']} in {m['label']}" for m in models)
        return f"{run.name}: measured the sink divergence of each head; positive are {heads}."
    if method in LOCKS:
        heads = f"{len((info.get('lock') or {}).get('heads') or [])} heads"
        return f"{run.name}: {LOCKS[method]} of {heads}, made on {_model(run)}."
    if verb == "restore":
        if info.get("adapter"):
            return f"{run.name}: restored {_model(run)} ({method})."
        return f"{run.name}: left {_model(run)} as it was ({method}): {info.get('finding') or 'no reason is recorded'}."
    return f"{run.name}: {verb} {method or ''}".rstrip() + "."


# ------------------------------------------------------------------------------------------------------- help


def _of(runs: Iterable[Run], verb: str, method: str | None = None) -> list[Run]:
    return [run for run in runs if run.info.get("verb") == verb and method in (None, run.info.get("method"))]


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    file = run.path / name
    return [row for _, row in read_json_lines(file)] if file.is_file() else []


def _json(run: Run, name: str) -> dict[str, Any]:
    """A JSON file of the run, {} without it."""
    file = run.path / name
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); run that step again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} is damaged (not a JSON object); run that step again")
    return found


def _rows_of(run: Run, role: str) -> int:
    return sum(d.get("rows") or 0 for d in run.info.get("data") or [] if d.get("role") == role)


def _model(run: Run) -> str:
    """A short name of the model a run started from."""
    ref = run.info.get("parent") or (run.info.get("model") or {}).get("ref")
    return Path(str(ref)).name if ref else "a model that is not recorded"


def _spread(found: list[Any], most: int) -> list[Any]:
    """At most about `most` of them, evenly taken."""
    return found[:: math.ceil(len(found) / most)] if len(found) > most else found


def _cut_table(label: str, columns: list[str], lines: list[list[str]], what: str, most: int = LINES) -> Table:
    left = len(lines) - most
    return Table(label, columns, lines[:most], f"{left:,} more {what} are not shown." if left > 0 else "")


def _finite(value: Any) -> Any:
    """JSON values without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: Any) -> str:
    """A prompt or answer as one string, chat messages one per line."""
    return "" if value is None else prompt_text(value) if isinstance(value, str | list) else str(value)


def _words(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= WORDS else text[:WORDS] + "…"


def _plain(text: str) -> str:
    """Text that a figure can hold."""
    return visible(str(text)).encode("utf-8", errors="replace").decode()


def _list(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))


def _decimals(value: float | None, digits: int) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def _ends(score: dict[str, float]) -> str:
    """'88, 100', the interval of a score in percent."""
    return ", ".join(f"{100 * score.get(end, score['value']):.0f}" for end in ("low", "high"))


def _time(value: float | None) -> str:
    """'15.8 ms', '4 min 2 s'."""
    if value is None:
        return "an unknown time"
    return seconds(value) if value >= 1 else f"{1000 * value:.3g} ms"


def _bytes(value: int | None) -> str:
    """'2.7 KiB'."""
    if value is None:
        return "of unknown size"
    scale = next((i for i in (3, 2, 1) if value >= 1024**i), 0)
    return f"{value / 1024**scale:.1f} {('', 'KiB', 'MiB', 'GiB')[scale]}" if scale else f"{value} bytes"
