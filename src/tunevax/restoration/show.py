"""The sections of a report on safety locks, Safe LoRA and Antidote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunevax.console import as_bytes, as_time
from tunevax.evidence.words import counted, percent
from tunevax.records import STRENGTH
from tunevax.report import charts as fig
from tunevax.report import text as tx
from tunevax.report.blocks import PANELS, Section, Table, cut
from tunevax.report.provenance import Provenance, Run
from tunevax.report.text import NONE

HEADS = 512  # layers, and heads of a layer, that a map can show
LOCKS = {"extract-lock": "a safety lock", "convert-lock": "a published safety lock, converted,"}
MEASURES = ("harmful/", "over-refusal", "task/exact", "utility/", "degenerate")


def summary(run: Run) -> str:
    """A sentence on the run."""
    info, method = run.info, run.info.get("method")
    if method in LOCKS:
        heads = f"{len((info.get('lock') or {}).get('heads') or [])} heads"
        return f"{run.name}: {LOCKS[method]} of {heads}, made on {tx.model_of(run)}."
    if info.get("adapter"):
        return f"{run.name}: restored {tx.model_of(run)} ({method})."
    why = info.get("finding") or "no reason is recorded"
    return f"{run.name}: left {tx.model_of(run)} as it was ({method}): {why}."


def measured(run: Run) -> dict[str, Any]:
    """The content of the run's files."""
    return {"strength": tx.json_of(run, STRENGTH)}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """On locks, on Safe LoRA's projections, and on Antidote's pruning."""
    runs = tx.runs_of(provenance.behind, "restore")
    projected, pruned = ([r for r in runs if r.info.get("method") == name] for name in ("safe-lora", "antidote"))
    locks = [run for run in runs if run not in projected and run not in pruned]
    return [s for s in (_locks(locks, figures), _safe_lora(projected), _antidote(pruned)) if s]


def _locks(runs: list[Run], figures: bool) -> Section:
    points, tables, drawn = [], [], set()
    panels: list[tuple[str, str]] = []
    known: dict[str, list[list[float]]] = {}  # the accuracy of all heads at extraction, by the base's identity
    for run in runs:
        lock = run.info.get("lock") or {}
        if identity := (lock.get("base") or {}).get("identity"):
            known.setdefault(identity, lock.get("accuracy_of_all") or [])
    for i, run in enumerate(runs):
        points.append(_locked(run))
        lock, content = run.info.get("lock") or {}, tx.json_of(run, STRENGTH)
        heads = [tuple(pair) for pair in lock.get("heads") or []]
        every = lock.get("accuracy_of_all") or known.get((lock.get("base") or {}).get("identity") or "") or []
        shown = (tuple(heads), str(every))
        if heads and not figures:
            tables.append(_heads(run, heads, lock.get("accuracy") or []))
        elif heads and len(panels) < PANELS and max(map(max, heads)) < HEADS and shown not in drawn:
            drawn.add(shown)
            panels.append(_lock_map(f"lock{i}", run, lock, heads, every))
        if content.get("curve"):
            tables.append(_strengths(run, content))
            if figures and len(panels) < PANELS:
                panels.append(_strength_curve(f"strength{i}", run, content))
    about = "A lock adds a fixed direction, from unsafe to safe, to the output of some attention heads. It repairs a "
    about += "fine-tune; whoever holds the weights can remove it."
    dots = " Dots are the locked heads; more colour is a probe that separates safe and unsafe answers better."
    about += figures * dots
    return Section("Safety locks", about, points=cut(points), panels=panels, tables=tables, titled=True)


def _locked(run: Run) -> str:
    info, lock, method = run.info, run.info.get("lock") or {}, run.info.get("method")
    heads, content = len(lock.get("heads") or []), tx.json_of(run, STRENGTH)
    layers = counted(len({x for x, _ in lock.get("heads") or []}), "layer")
    where = f"{heads} heads in {layers}"
    swept = ""
    if content.get("curve"):
        tried, chosen = tx.listed([f"{point['strength']:g}" for point in content["curve"]]), content.get("chosen")
        swept = f" Of the strengths {tried}, on {content.get('prompts')} validation prompts, "
        swept += "none is within the limits." if chosen is None else f"{chosen:g} is the smallest within the limits."
    if method == "extract-lock":
        total = (lock.get("n_layers") or 0) * (lock.get("n_heads") or 0)
        text = f"{run.name} chose {heads} of {tx.model_of(run)}'s {total or ''} heads".replace("  ", " ")
        text += f" in {layers}, from {lock.get('pairs')} pairs of answers and the last "
        return f"{text}{lock.get('r')} tokens of each; {_probed(lock)}. The lock is {as_bytes(lock.get('bytes'))}."
    if method == "convert-lock":
        base = (lock.get("base") or {}).get("ref") or "a base that it does not name"
        return f"{run.name} is a published lock of {where} ({lock.get('source')}), for {base}, without an accuracy."
    if not lock:
        return f"{run.name} applied no lock to {tx.model_of(run)}.{swept}"
    form = {"stock": "a checkpoint that stock transformers loads", "run": "biases that tunevax attaches"}
    text = f"{run.name} applied a lock of {where} to {tx.model_of(run)} at strength {lock.get('strength'):g}, as "
    text += f"{form.get(str(lock.get('form')), lock.get('form'))}: {as_time(lock.get('seconds_to_apply'))} to apply, "
    text += f"{as_bytes(lock.get('bytes_added'))} added" + (f"; {_probed(lock)}." if lock.get("accuracy") else ".")
    return text + (f" Finding: {info['finding']}." if info.get("finding") else "") + swept


def _probed(lock: dict) -> str:
    """Accuracy of the probes, and the tokens it was measured on."""
    accuracy, every = lock.get("accuracy") or [], [a for layer in lock.get("accuracy_of_all") or [] for a in layer]
    if not accuracy:
        return "the accuracy of its probes is unknown"
    text = f"its probes are right on {percent(min(accuracy))} to {percent(max(accuracy))} of tokens"
    if lock.get("probe") == "grouped":
        text += " of prompts they were not fitted to"
    if lock.get("probe") == "official":
        text += " by the published split, which has tokens of one answer on both sides"
    return text + (f" (all heads: {percent(min(every))} to {percent(max(every))})" if every else "")


def _heads(run: Run, heads: list[tuple[int, int]], accuracy: list[float]) -> Table:
    """The map, for a form without figures."""
    known = {at: f" ({percent(value)})" for at, value in zip(heads, accuracy, strict=False)}
    by_layer: dict[str, list[str]] = {}
    for x, y in sorted(heads):
        by_layer.setdefault(str(x), []).append(f"{y}{known.get((x, y), '')}")
    lines = [[layer, ", ".join(names)] for layer, names in by_layer.items()]
    return tx.cut_table(f"{run.name}: locked heads", ["layer", "heads (accuracy of the probe)"], lines, "layers")


def _lock_map(key: str, run: Run, lock: dict, heads: list[tuple], every: list[list[float]]) -> tuple[str, str]:
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
    text = "Locked heads by layer: " + ", ".join(f"{x}: {n}" for x, n in sorted(Counter(x for x, _ in heads).items()))
    title = f"{run.name}: {len(heads)} locked heads"
    return title, fig.head_map(key, tx.plain(title), cells, set(heads), low, high - low, scale, text)


def _measured(content: dict) -> list[str]:
    """The scores of a sweep that its limits are on, in the order of MEASURES."""
    names = [name for name in content["curve"][0].get("scores") or {} if name.startswith(MEASURES)]
    return sorted(names, key=lambda n: next(i for i, m in enumerate(MEASURES) if n.startswith(m)))


def _strengths(run: Run, content: dict) -> Table:
    lines, names = [], _measured(content)
    for point in sorted(content["curve"], key=lambda p: p["strength"]):
        scores = point.get("scores") or {}
        chosen = ", chosen" if point["strength"] == content.get("chosen") else ""
        cells = [f"{percent(scores[n]['value'])} [{tx.ends_of(scores[n])}]" if n in scores else NONE for n in names]
        lines.append([f"{point['strength']:g}{chosen}", *cells, "; ".join(point.get("misses") or []) or "nothing"])
    note = ""
    if limits := content.get("limits") or {}:
        harm, keys = percent(limits["harmful_target"]), ("max_utility_loss", "max_over_refusal")
        loss, refusal = (f"{100 * limits[key]:g} points" for key in keys)
        note = f"Limits: a harmful score of at most {harm} by every judge; against strength 0, over-refusal at most "
        note += f"{refusal} higher, accuracy at most {loss} lower, degenerate answers at most {loss} more."
    return Table(f"{run.name}: scores by strength", ["strength", *names, "misses the limit on"], lines, note)


def _strength_curve(key: str, run: Run, content: dict) -> tuple[str, str]:
    names = _measured(content)
    points = sorted(content["curve"], key=lambda p: p["strength"])
    judges = [n for n in names if n.startswith("harmful/")]
    series = {}
    for name in names:
        label = tx.plain("harmful" if judges == [name] else name)
        series[label] = [(p["strength"], p["scores"][name]) for p in points if name in p["scores"]]
    chosen = content.get("chosen")
    title = f"{run.name}: scores by strength" + ("" if chosen is None else f" (chosen: {chosen:g})")
    target = (content.get("limits") or {}).get("harmful_target", 0.0)
    return title, fig.sweep(key, tx.plain(title), series, target, chosen)


def _safe_lora(runs: list[Run]) -> Section:
    points, tables = [], []
    for run in runs:
        rows = run.info.get("layers") or []
        cosines = [r["cosine"] for r in rows if r.get("cosine") is not None]
        taken = [r for r in rows if r.get("projected")]
        projector = (run.info.get("config") or {}).get("projector")
        aligned, base = (Path(str(run.info.get(k) or "?")).name for k in ("aligned", "base"))
        text = f"{run.name} projected {len(taken)} of {len(rows)} layers of {tx.model_of(run)} ({projector} projector) "
        text += f"on the change from {base} to {aligned}"
        text += f"; cosines are {min(cosines):.2f} to {max(cosines):.2f}." if cosines else "."
        if full := sum(r.get("rank") == r.get("out") for r in rows):
            text += f" In {full} layers alignment changed every direction, so the exact projector has no effect there."
        points.append(text)
        marked = [(r["layer"], tx.decimals(r.get("cosine"), 2) + (" •" if r.get("projected") else "")) for r in rows]
        tables.append(_by_block(f"{run.name}: cosine of each layer, • where it was projected", marked))
        if projector != "exact":
            ratio = [(r["layer"], tx.decimals(r.get("ratio"), 3)) for r in rows]
            tables.append(_by_block(f"{run.name}: length of the projected update, as a share of its own", ratio))
    about = "The cosine between an adapter's update and its projection on the change by alignment: 1 is an update "
    about += "within it. The layers of the lowest cosine are projected."
    return Section("Safe LoRA", about, points=cut(points), tables=tables, titled=True)


def _antidote(runs: list[Run]) -> Section:
    points, tables = [], []
    for run in runs:
        rows, options = run.info.get("layers") or [], run.info.get("config") or {}
        left = [r["ratio"] for r in rows if r.get("ratio") is not None]
        what = "the update" if options.get("form") == "effective" else "the adapter's two factors"
        text = f"{run.name} pruned, in {len(rows)} layers of {tx.model_of(run)}, the weights of {what} that matter for "
        text += f"{run.info.get('rows'):,} harmful prompts (alpha {options.get('alpha'):g})"
        text += f"; {percent(min(left))} to {percent(max(left))} of its length remain." if left else "."
        points.append(text)
        shares = [(r["layer"], f"{100 * r['pruned']:.1f} %") for r in rows]
        lengths = [(r["layer"], NONE if r.get("ratio") is None else percent(r["ratio"])) for r in rows]
        tables.append(_by_block(f"{run.name}: share of the weights pruned in each layer", shares))
        tables.append(_by_block(f"{run.name}: remaining length of the update", lengths))
    about = "Of the weights that the fine-tune added, those that matter most for harmful answers are set to zero."
    return Section("Antidote", about, points=cut(points), tables=tables, titled=True)


def _by_block(label: str, cells: Sequence[tuple[str, str]]) -> Table:
    """(layer name, text) as a table, a row per block and a column per kind of layer."""
    rows: dict[str, dict[str, str]] = {}
    for layer, text in cells:
        number = re.search(r"\.(\d+)\.", layer)
        rows.setdefault(number[1] if number else NONE, {})[layer.rpartition(".")[2]] = text
    columns = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    lines = [[block, *(row.get(kind, NONE) for kind in columns)] for block, row in rows.items()]
    return tx.cut_table(label, ["block", *columns], lines, "blocks", 80)
