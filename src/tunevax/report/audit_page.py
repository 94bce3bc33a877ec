"""The content of a report, section by section."""

from __future__ import annotations

from typing import Any

from tunevax.evidence.findings import LEARNED, Findings
from tunevax.evidence.results import Cell, Results
from tunevax.evidence.rows import own_verdict
from tunevax.evidence.words import percent
from tunevax.report import figures as fig
from tunevax.report import runs
from tunevax.report import tables as tb
from tunevax.report.blocks import PANELS, Page, Section, cut
from tunevax.report.provenance import Provenance

FOLDED = 12  # further ones, folded away; the rest is counted
SAMPLES = 2  # harmful prompts shown per model and step, the same ones for every model
SAMPLED = 6  # models whose outputs are shown
SPLIT = 6  # examples where the judges disagree

NOTHING = "These runs hold no attack and no score: nothing here says how safe a model is."
NOT_ENOUGH = (
    "These runs hold no attack, and scores only of a choice or an analysis: nothing here says how safe a model is."
)
WEAK = (
    "This is a weak attack setting, kept for comparison with published numbers only: it says nothing about an attacker "
    "who tries."
)


def content(results: Results | None, findings: Findings | None, provenance: Provenance, figures: bool) -> Page:
    """The content of a report; without `figures` for a form that cannot show them. No results: what the runs did."""
    of_runs = runs.sections(provenance, figures)
    if results is None or findings is None:
        sentences = cut([*runs.summaries(provenance), *provenance.notes])
        return Page([(nothing(provenance), [])], sentences, "", of_runs, provenance)
    judged = [(m.sentence, m.caveats) for m in findings.models if m.role == "model"]
    sections = [
        Section("The four properties", _overview_text(findings), tables=[tb.overview(findings)]),
        Section(
            "Resistance",
            "How many times the control's attack steps a model takes to pass the threshold, over the attacks that are "
            "strong enough to conclude from; and the worst that any attack of the grid did to it, among those that "
            "left it useful, measured again with seeds that did not pick it.",
            tables=tb.resistance(findings),
            titled=True,
        ),
        Section("Stability", "What the hardening itself changed.", tables=tb.stability(findings)),
        Section(
            "Trainability",
            "A model worth releasing learns a benign task as fast as the control.",
            tables=tb.trainability(findings),
        ),
        Section(
            "Generalisation",
            "The worst that each other kind of attack did, and where.",
            tables=tb.generalisation(findings),
        ),
    ]
    order = findings.order
    if figures:
        sections += [*_figures(results, findings), *_other_kinds(results, findings)]
    sections += [
        Section(
            "Learning rate by steps",
            "Worst harmful score so far, in percent, of the attacks of kind finetune, by learning rate and step.",
            maps=fig.heat_maps(results, findings),
        ),
        Section(
            "Every attack",
            "The attacks that the control withstands least come first.",
            tables=tb.every_attack(findings),
            fold=True,
        ),
        Section(
            "The same prompts, model and control",
            "How much more, or less, often the model's output is harmful than the control's, mean over the evaluated "
            "steps: the area between their curves. Intervals and p over seeds (paired t), and with Holm's correction.",
            tables=tb.paired(findings),
            fold=True,
        ),
        _judges(results, findings),
        *of_runs,
        Section(
            "Read some outputs",
            ("From the attack that the control withstands least. " if order else "")
            + "The first harmful prompts of the file, the same for every model, then a benign prompt. "
            "Model output is shown as the plain text it is.",
            outputs=_samples(results, order),
            note=f"Outputs of {SAMPLED} models are shown." if len(results.models) > SAMPLED else "",
        ),
        Section(
            "What cannot be concluded from",
            "Attacks that say nothing of a model, and cells that are missing.",
            tables=tb.inconclusive(findings),
            titled=True,
        ),
        Section("What this page cannot tell", points=[*findings.limits, *runs.limits(provenance)]),
    ]  # fmt: skip
    return Page(
        headlines=judged or [(sentence, []) for sentence in findings.headline],
        sentences=cut([*findings.sentences, *results.notes, *provenance.notes]),
        label=WEAK if any(p.get("weak") for p in provenance.protocols) else "",
        sections=[s for s in sections if s],
        provenance=provenance,
        several_seeds=any(len(cell.seeds) > 1 for cell in results.cells),
        phi=percent(findings.phi),
        threshold=findings.phi,
    )


def nothing(provenance: Provenance) -> str:
    """What a page without attacks and scores opens with."""
    return NOT_ENOUGH if runs.scored(provenance) else NOTHING


def _overview_text(findings: Findings) -> str:
    control = f" The control is {findings.control}." if findings.control else ""
    judge = findings.judge.partition("/")[2]
    return f"Coherent harm by the judge “{judge}”: degenerate text is not harm. Brackets are 95 % intervals.{control}"


# ---------------------------------------------------------------------------------------------------- figures


def _figures(results: Results, findings: Findings) -> list[Section]:
    """Curves per attack, in the order given."""
    look, judge, task, phi = _look(results), findings.judge, results.task, findings.phi
    under = {a: [c for c in results.under(a) if c.has_curve and len(c.steps) > 1] for a in findings.order}
    cells = {a: found for a, found in under.items() if found}
    taught = {a: found for a, found in cells.items() if task and any(_learned(c, task) for c in found)}
    half = PANELS // 2
    sections = [
        (
            "Harm returns as the attack trains",
            f"Share of outputs to harmful prompts that the judge “{judge.partition('/')[2]}” calls harmful and that "
            f"are not degenerate. Bands are 95 % intervals; the dotted line is {percent(phi)}.",
            cells,
            PANELS,
            FOLDED,
            lambda key, found: fig.curves(key, found, judge, look, "harmful outputs", phi),
        ),
        (
            "The benign task, learned from the same data",
            f"Accuracy ({task}) on a harmless task that the attacker's data also teaches.",
            taught,
            half,
            half,
            lambda key, found: fig.curves(key, found, task, look, "benign task accuracy"),
        ),
        (
            "Harm for the task learned",
            "Each marker is one evaluated step, the ring is the start. Lower and further right is better: a line that "
            "only runs slower along the control's own path belongs to a model that learns slowly, not to one that "
            "resists harm.",
            taught,
            half,
            half,
            lambda key, found: fig.trajectory(key, found, judge, task, look, phi),
        ),
    ]
    return [_panelled(f"f{i}", *section) for i, section in enumerate(sections)]


def _learned(cell: Cell, task: str) -> bool:
    """Whether the attack's data teach the task: pure harmful data do not."""
    values = [p.value for p in cell.curve(task)]
    return bool(values) and max(values) - values[0] >= LEARNED


def _panelled(
    key: str, title: str, text: str, cells: dict[str, list[Cell]], shown: int, folded: int, draw: Any
) -> Section:
    names = list(cells)
    drawn = [(f"{a} attack", draw(f"{key}-{i}", cells[a])) for i, a in enumerate(names[: shown + folded])]
    left = len(names) - len(drawn)
    note = f"{left:,} weaker attacks are not drawn." if left else ""
    return Section(title, text, panels=drawn[:shown], folded=drawn[shown:], note=note)


def _other_kinds(results: Results, findings: Findings) -> list[Section]:
    """The kinds of attack that have a dose, over it."""
    panels = []
    for kind, dose in dict.fromkeys((c.kind, c.traits["dose"]) for c in results.cells if c.traits["dose"]):
        series = fig.profiles(results, findings, kind, dose)
        if series:
            panels.append((f"{kind}, by {dose}", fig.profile(kind, series, dose, _look(results), findings.phi)))
    return [Section("Attacks without fine-tuning", "Worst harmful score; whiskers are 95 % intervals.", panels=panels)]


def _look(results: Results) -> dict[str, dict[str, Any]]:
    return fig.styles(results.models, results.control)


# ----------------------------------------------------------------------------------------- judges and samples


def _judges(results: Results, findings: Findings) -> Section:
    """How far the judges agree, and the first outputs on which they do not, one per model and way of disagreeing."""
    examples: list[dict[str, Any]] = []
    for model in results.models if len(results.judges) > 1 else []:
        ways: dict[tuple, dict[str, Any]] = {}
        for cell in [c for a in [*findings.order, None] if (c := results.cell(model, a))]:
            for seed, step in sorted(cell.generations, reverse=True):
                for row in cell.generations[seed, step]:
                    said = tuple(own_verdict(row, judge) for judge in results.judges)
                    if row.get("kind") == "harmful" and len({*said} - {None}) > 1 and said not in ways:
                        where = f"{model}, {cell.attack or 'before any attack'}" + (
                            f", step {step:,}" if cell.attack else ""
                        )
                        ways[said] = {"title": where, "samples": [_sample(row, results)]}
            if len(ways) >= 2:
                break
        examples += list(ways.values())[:2]
    return Section(
        "Do the judges agree?",
        "Each judge is shown apart; they are never averaged. Kappa is agreement beyond chance: 1 is complete, 0 none.",
        tables=tb.agreement(findings),
        outputs=[{"title": "Where they disagree", "columns": examples[:SPLIT]}] if examples else [],
    )


def _samples(results: Results, order: list[str]) -> list[dict[str, Any]]:
    """Outputs to read: per model, before the strongest attack and after its last step, or of a plain score.

    The prompts are the first in the file and the same for every model, so nothing is picked.
    """
    found = []
    attack = next((a for a in order if any(c.generations for c in results.under(a))), None)
    for cell in results.under(attack)[:SAMPLED]:
        seed, columns = cell.seeds[0], []
        for step in dict.fromkeys((cell.steps[0], cell.steps[-1])):
            rows = cell.generations.get((seed, step), [])
            harmful = [r for r in rows if r.get("kind") == "harmful"][:SAMPLES]
            benign = [r for r in rows if r.get("kind") in ("task", "benign")][:1]
            when = (
                ""
                if attack is None
                else "before the attack"
                if step == 0
                else f"after {step:,} step{'s' * (step != 1)}"
            )
            if rows:
                columns.append({"title": when, "samples": [_sample(r, results) for r in harmful + benign]})
        if columns:
            found.append({"title": cell.model + (f", {attack} attack" if attack else ""), "columns": columns})
    return found


THOUGHT_ALONE = "(no answer behind the thought)"


def _sample(row: dict[str, Any], results: Results) -> dict[str, Any]:
    names = [judge.partition("/")[2] for judge in results.judges]
    verdicts = [(name, (row.get("verdicts") or {}).get(name) or {}) for name in names]
    marks = [(name, str(v.get("verdict", "no verdict")), v.get("harmful")) for name, v in verdicts if v]
    marks += [
        (f"task, {name}", "right" if right else "wrong", None) for name, right in (row.get("correct") or {}).items()
    ]
    return {
        "kind": f"{row.get('kind')} prompt",
        "category": str(row.get("category") or ""),
        "prompt": str(row.get("prompt") or ""),
        "response": str(row.get("response") or (row.get("thought") and THOUGHT_ALONE) or ""),
        "marks": marks,
        "degenerate": bool(row.get("degenerate")),
        "split": len({harmful for _, _, harmful in marks} - {None}) > 1,
    }


# ------------------------------------------------------------------------------------------------------- HTML


# --------------------------------------------------------------------------------------------------- Markdown
