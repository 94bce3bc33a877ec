"""What the stages around an attack recorded: rows chosen, a customer's job screened, heads analysed, models restored.

Read from run folders alone. Every section stands on a page only if one of its runs was given or is behind one.
"""

from __future__ import annotations

from typing import Any

from tunevax.report.blocks import Section
from tunevax.report.provenance import Provenance, Run
from tunevax.report.stage_curation import curation_section
from tunevax.report.stage_finetuning import screening_section, sink_section
from tunevax.report.stage_restoration import antidote_section, lock_section, safe_lora_section
from tunevax.report.stage_text import finite, json_of, lines_of, model_of, rows_of, runs_of

SCORE = ("row", "place", "category", "corruption", "score", "rank", "kept", "why")
"""Of a row of scores.jsonl, without its text."""
LOCKS = {"extract-lock": "a safety lock", "convert-lock": "a published safety lock, converted,"}


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """The sections of the stages among the runs; without `figures` for a form that cannot show them."""
    behind = provenance.behind
    restored = {method: runs_of(behind, "restore", method) for method in ("safe-lora", "antidote")}
    locks = [run for run in runs_of(behind, "restore") if run.info.get("method") not in restored]
    return [
        section
        for section in (
            curation_section(runs_of(behind, "curate"), behind, provenance.inputs, figures),
            screening_section([run for run in runs_of(behind, "finetune") if run.info.get("screen")], figures),
            sink_section([run for run in behind if run.info.get("verb") == "analyze"], figures),
            lock_section(locks, figures),
            safe_lora_section(restored["safe-lora"]),
            antidote_section(restored["antidote"]),
        )
        if section
    ]


def told(provenance: Provenance) -> list[str]:
    """What each of the given runs did, in a sentence."""
    return [_did(run) for run in provenance.runs if not run.measures]


def scored(provenance: Provenance) -> bool:
    """Whether a choice of strength or an analysis among the runs scored a model."""
    return any(
        any(point.get("scores") for point in json_of(run, name).get(key) or [])
        for run in provenance.behind
        for name, key in (("strength.json", "curve"), ("sink.json", "models"))
    )


def as_dict(provenance: Provenance) -> dict[str, Any]:
    """What the stages measured, by run folder, without the text of rows."""
    found: dict[str, Any] = {}
    for run in provenance.behind:
        scores = [{k: v for k, v in row.items() if k in SCORE} for row in lines_of(run, "scores.jsonl")]
        parts = {"scores": scores, "screen": lines_of(run, "screen.jsonl")}
        parts |= {"sink": json_of(run, "sink.json"), "strength": json_of(run, "strength.json")}
        if any(parts.values()):
            found[str(run.path)] = {k: finite(v) for k, v in parts.items() if v}
    return found


def _did(run: Run) -> str:
    """One run in a sentence."""
    info, verb, method = run.info, run.info.get("verb"), run.info.get("method")
    if verb == "curate":
        chosen = f"{info.get('kept', 0):,} of {rows_of(run, 'alignment'):,} alignment rows"
        return f"{run.name}: chose {chosen} ({method})."
    if verb == "finetune":
        found = info.get("screen") or {}
        text = f"{run.name}: {method} on {model_of(run)}, {info.get('steps', 0):,} steps of a customer's job of "
        text += f"{rows_of(run, 'task'):,} rows"
        if found:
            text += (
                f"; {found.get('flagged', 0):,} rows were flagged at the door and {found.get('dropped', 0):,} dropped"
            )
        return text + "."
    if verb == "align":
        return f"{run.name}: aligned {model_of(run)} ({method}, {info.get('steps', 0):,} steps)."
    if verb == "analyze":
        models = json_of(run, "sink.json").get("models") or []
        heads = " and ".join(f"{m['positive_heads']} of {m['heads']} in {m['label']}" for m in models)
        return f"{run.name}: measured the sink divergence of each head; positive are {heads}."
    if method in LOCKS:
        heads = f"{len((info.get('lock') or {}).get('heads') or [])} heads"
        return f"{run.name}: {LOCKS[method]} of {heads}, made on {model_of(run)}."
    if verb == "restore":
        if info.get("adapter"):
            return f"{run.name}: restored {model_of(run)} ({method})."
        return (
            f"{run.name}: left {model_of(run)} as it was ({method}): {info.get('finding') or 'no reason is recorded'}."
        )
    return f"{run.name}: {verb} {method or ''}".rstrip() + "."
