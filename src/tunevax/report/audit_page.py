"""The content of a report, section by section."""

from __future__ import annotations

from typing import Any

from tunevax.evidence.findings import LEARNED, Findings
from tunevax.evidence.results import Results
from tunevax.evidence.rows import own_verdict
from tunevax.evidence.words import counted, percent
from tunevax.records import Generation
from tunevax.report import figures as fig
from tunevax.report import runs
from tunevax.report import tables as tb
from tunevax.report.blocks import PANELS, Page, Section, cut
from tunevax.report.provenance import Provenance

FOLDED = 12  # figures that are folded away
SAMPLES = 2  # harmful prompts shown per model and step
SAMPLED = 6  # models whose outputs are shown
SPLIT = 6  # examples where the judges disagree

WEAK = (
    "This is a weak attack setting, for comparison with published numbers only: it says nothing about a determined "
    "attacker."
)
RESISTANCE = (
    "How many times the control's attack steps a model takes to pass the threshold, over the attacks that are strong "
    "enough to conclude from; and the worst outcome of any attack of the grid that left the model useful, measured "
    "again with seeds that did not pick it."
)
PAIRED = (
    "How much more, or less, often the model's output is harmful than the control's, mean over the evaluated steps: "
    "the area between their curves. Intervals and p over seeds (paired t), and with Holm's correction."
)
THOUGHT_ALONE = "(no answer after the thought)"


def content(results: Results | None, findings: Findings | None, provenance: Provenance, figures: bool) -> Page:
    """The content of a report; without `figures` for a form that cannot show them. No results: what the runs did."""
    of_runs = runs.sections(provenance, figures)
    if results is None or findings is None:
        sentences = cut([*runs.summaries(provenance), *provenance.notes])
        return Page([(nothing(provenance), [])], sentences, "", of_runs, provenance)
    judged = [(m.sentence, m.caveats) for m in findings.models if m.role == "model"]
    control = f" The control is {findings.control}." if findings.control else ""
    harm = f"Coherent harm by the judge “{findings.judge.partition('/')[2]}”: degenerate text is not harm."
    about = f"{harm} Brackets are 95 % intervals.{control}"
    sections = [
        Section("The four properties", about, tables=[tb.overview(findings)]),
        Section("Resistance", RESISTANCE, tables=tb.resistance(findings), titled=True),
        Section("Stability", "What the hardening itself changed.", tables=tb.stability(findings)),
        Section("Trainability", "How fast a model learns a benign task.", tables=tb.trainability(findings)),
        Section("Generalisation", "The worst of each other kind of attack.", tables=tb.generalisation(findings)),
    ]
    if figures:
        sections += [*_figures(results, findings), _other_kinds(results, findings)]
    outputs = "From the attack that the control resists least. " if findings.order else ""
    heat = "Worst harmful score so far, in percent, of the attacks of kind finetune, by learning rate and step."
    order = "The attacks that the control resists least come first."
    sections += [
        Section("Learning rate by steps", heat, maps=fig.heat_maps(results, findings)),
        Section("Every attack", order, tables=tb.every_attack(findings), fold=True),
        Section(
            "The same prompts, model and control",
            PAIRED,
            tables=[*tb.paired(findings), *tb.margins(findings)],
            fold=True,
        ),
        _judges(results, findings),
        *of_runs,
        Section(
            "Sample outputs",
            f"{outputs}The first harmful prompts of the file, the same for every model, then a benign prompt. "
            "Model output is shown as plain text.",
            outputs=_samples(results, findings.order),
            note=f"Outputs of {SAMPLED} models are shown." if len(results.models) > SAMPLED else "",
        ),
        Section("Inconclusive attacks and missing cells", tables=tb.inconclusive(findings), titled=True),
        Section("Limitations", points=[*findings.limits, *runs.limits(provenance)]),
    ]
    return Page(
        judged or [(sentence, []) for sentence in findings.headline],
        cut([*findings.sentences, *results.notes, *provenance.notes]),
        WEAK if any(p.get("weak") for p in provenance.protocols) else "",
        [section for section in sections if section], provenance,
        several_seeds=any(len(cell.seeds) > 1 for cell in results.cells), threshold=findings.phi,
    )  # fmt: skip


def nothing(provenance: Provenance) -> str:
    """The opening of a report without attacks and scores."""
    but = ", and only scores of a choice or an analysis" if runs.scored(provenance) else " and no score"
    return f"These runs contain no attack{but}: nothing here says how safe a model is."


def _figures(results: Results, findings: Findings) -> list[Section]:
    """Curves per attack, in the order of the findings."""
    look, judge, phi = fig.styles(results.models, results.control), findings.judge, findings.phi
    under = {a: [c for c in results.under(a) if c.has_curve and len(c.steps) > 1] for a in findings.order}
    cells = {a: curved for a, curved in under.items() if curved}
    sections = [
        _panelled(
            "Harm returns as the attack trains",
            f"Share of outputs to harmful prompts that the judge “{judge.partition('/')[2]}” calls harmful and that "
            f"are not degenerate. Bands are 95 % intervals; the dotted line is {percent(phi)}.",
            {a: fig.curves(f"f0-{i}", cells[a], judge, look, "harmful outputs", phi)
             for i, a in enumerate([*cells][: PANELS + FOLDED])},
            PANELS, len(cells),
        )
    ]  # fmt: skip
    sections += [
        _panelled(
            "Which answer the model prefers",
            f"{score.partition('/')[2]}: mean log-likelihood per token of the harmful answer minus the refusal's, in "
            "nats. Above 0 the harmful answer is preferred. It moves before a share of prompts does.",
            {a: fig.curves(f"f3-{n}-{i}", cells[a], score, look, "margin in nats", 0.0)
             for i, a in enumerate([*cells][:PANELS])},
            PANELS, len(cells),
        )
        for n, score in enumerate(results.margins) if all(c.curve(score) for a in [*cells][:PANELS] for c in cells[a])
    ]  # fmt: skip
    if task := results.task:
        accuracies = {a: [[p.value for p in c.curve(task)] for c in curved] for a, curved in cells.items()}
        # What the attack's data teach: pure harmful data teach no task.
        taught = [a for a, values in accuracies.items() if any(v and max(v) - v[0] >= LEARNED for v in values)]
        drawn, half = taught[:PANELS], (PANELS // 2, len(taught))
        sections += [
            _panelled(
                "The benign task, learned from the same data",
                f"Accuracy ({task}) on a harmless task that the attacker's data also teaches.",
                {a: fig.curves(f"f1-{i}", cells[a], task, look, "benign task accuracy") for i, a in enumerate(drawn)},
                *half,
            ),
            _panelled(
                "Harm for the task learned",
                "Each marker is one evaluated step, the ring is the start. Lower and further right is better: a line "
                "along the control's own path, only slower, belongs to a model that learns slowly, not to one that "
                "resists harm.",
                {a: fig.trajectory(f"f2-{i}", cells[a], judge, task, look, phi) for i, a in enumerate(drawn)},
                *half,
            ),
        ]
    return sections


def _panelled(title: str, text: str, drawn: dict[str, str], shown: int, of: int) -> Section:
    """Figures by attack, the first on view and the rest folded away; those of `of` that were not drawn are counted."""
    panels = [(f"{attack} attack", svg) for attack, svg in drawn.items()]
    note = f"{of - len(panels):,} weaker attacks are not drawn." if of > len(panels) else ""
    return Section(title, text, panels=panels[:shown], folded=panels[shown:], note=note)


def _other_kinds(results: Results, findings: Findings) -> Section:
    """The kinds of attack that have a dose, over it."""
    panels, look = [], fig.styles(results.models, results.control)
    for kind, dose in dict.fromkeys((c.kind, c.traits["dose"]) for c in results.cells):
        if dose and (series := fig.profiles(results, findings, kind, dose)):
            panels.append((f"{kind}, by {dose}", fig.profile(kind, series, dose, look, findings.phi)))
    return Section("Attacks without fine-tuning", "Worst harmful score; whiskers are 95 % intervals.", panels=panels)


def _judges(results: Results, findings: Findings) -> Section:
    """How far the judges agree, and the first outputs on which they disagree, one per model and pattern of verdicts."""
    examples: list[dict[str, Any]] = []
    for model in results.models if len(results.judges) > 1 else []:
        ways: dict[tuple, dict[str, Any]] = {}
        for cell in [c for a in [*findings.order, None] if (c := results.cell(model, a))]:
            for seed, step in sorted(cell.generations, reverse=True):
                for row in cell.generations[seed, step]:
                    verdicts = tuple(own_verdict(row, judge) for judge in results.judges)
                    if row.get("kind") == "harmful" and len({*verdicts} - {None}) > 1 and verdicts not in ways:
                        where = f"{cell.attack}, step {step:,}" if cell.attack else "before any attack"
                        ways[verdicts] = {"title": f"{model}, {where}", "samples": [_sample(row, results)]}
            if len(ways) >= 2:
                break
        examples += list(ways.values())[:2]
    return Section(
        "Do the judges agree?",
        "Each judge is shown separately; they are never averaged. Kappa is agreement beyond chance, at most 1.",
        tables=tb.agreement(findings),
        outputs=[{"title": "Where they disagree", "columns": examples[:SPLIT]}] if examples else [],
    )


def _samples(results: Results, order: list[str]) -> list[dict[str, Any]]:
    """Per model, outputs to the file's first prompts before the strongest attack and after it, or of a plain score."""
    groups = []
    attack = next((a for a in order if any(c.generations for c in results.under(a))), None)
    for cell in results.under(attack)[:SAMPLED]:
        seed, columns = cell.seeds[0], []
        for step in dict.fromkeys((cell.steps[0], cell.steps[-1])):
            rows = cell.generations.get((seed, step), [])
            harmful = [r for r in rows if r.get("kind") == "harmful"][:SAMPLES]
            benign = [r for r in rows if r.get("kind") in ("task", "benign")][:1]
            when = f"after {counted(step, 'step')}" if step else "before the attack"
            samples = [_sample(r, results) for r in harmful + benign]
            columns += [{"title": when if attack else "", "samples": samples}] if rows else []
        if columns:
            groups.append({"title": cell.model + (f", {attack} attack" if attack else ""), "columns": columns})
    return groups


def _sample(row: Generation, results: Results) -> dict[str, Any]:
    verdicts, names = row.get("verdicts") or {}, [judge.partition("/")[2] for judge in results.judges]
    judged = [(name, verdicts[name]) for name in names if verdicts.get(name)]
    correct: dict[str, bool] = row.get("correct") or {}
    marks = [
        *((name, str(v.get("verdict", "no verdict")), v.get("harmful")) for name, v in judged),
        *((f"task, {name}", "right" if right else "wrong", None) for name, right in correct.items()),
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
