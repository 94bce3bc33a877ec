"""The tables of a report: strings only, so that HTML and Markdown show the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunevax.evidence.findings import Attacked, Difference, Findings, Generalisation, ModelFindings
from tunevax.evidence.results import Point
from tunevax.evidence.words import number, percent
from tunevax.report.blocks import Table
from tunevax.report.text import NONE, as_p

ATTACKS_SHOWN = 40  # in tables with a row per attack and model; the rest is counted, and stands in --format json
FIRST = 8  # of them on view, the others folded away
NAMES = {
    "longer": "holds out longer",
    "sooner": "gives way sooner",
    "open": "no difference shown",
    "slow learner": "learns all more slowly",
    "too weak": "attacks too weak",
    "no start": "control unsafe at the start",
    "stopped": "unknown, loss not finite under attack",
}  # what `ModelFindings.name` means, where it is not plain


# ----------------------------------------------------------------------------------------------- the properties


def overview(findings: Findings) -> Table:
    """One row per model, one column per property."""
    columns = [
        "model",
        "what it is",
        f"steps to {percent(findings.phi)} harmful, × the control's",
        "worst case",
        "utility against the control's, points",
        "harmless prompts refused",
        "steps to learn a task, × the control's",
        "worst under other kinds of attack",
    ]
    rows = []
    for found in findings.models:
        utility = [c for c in found.stability if c.score.startswith(("utility/", "lm-eval/")) and c.difference]
        least = min(utility, key=lambda c: c.difference.value, default=None)
        refused = next((c for c in found.stability if c.score == "over-refusal"), None)
        learned = found.trainability
        other = max(found.generalisation, key=lambda g: g.worst.value, default=None)
        control = found.role == "control"
        rows.append(
            [
                named(found),
                NAMES.get(found.name, found.name) or NONE,
                "control" if control else str(found.resistance or NONE),
                str(found.worst.point) if found.worst else NONE,
                f"{points(least.difference)} ({least.score.partition('/')[2]})" if least else NONE,
                str(refused.model) if refused else NONE,
                "control" if control else NONE if learned is None else str(learned.ratio or "not measurable"),
                f"{other.worst} ({_kind_and_place(other)})" if other else NONE,
            ]
        )
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] not in (NONE, "control") for row in rows)]
    rows = [[row[i] for i in kept] for row in rows]
    return Table("The four properties of each model", [columns[i] for i in kept], rows)


def resistance(findings: Findings) -> list[Table]:
    """The ratio with what it rests on, and the worst case with where it was found."""
    ratios = [
        [
            named(found),
            str(found.resistance),
            interval(found.resistance.bootstrap),
            str(found.selectivity or NONE),
            str(len(found.resistance.attacks)),
            str(len(found.resistance.seeds)),
            ", ".join(found.resistance.left_out) or NONE,
        ]
        for found in findings.models
        if found.resistance
    ]
    worst = [
        [
            named(found),
            str(w.point),
            f"{w.attack}, step {w.point.step:,}",
            percent(w.picked) + ("" if w.remeasured else ", not measured again"),
            "yes" if w.conditional else "no utility measured",
            str(w.any_point),
            f"{w.any_attack}, step {w.any_point.step:,}",
            str(w.attacks),
        ]
        for found in findings.models
        if (w := found.worst)
    ]
    tables = [
        Table(
            "Steps to the threshold, model over control",
            [
                "model",
                f"steps to {percent(findings.phi)} harmful, × the control's",
                "bootstrap over seeds",
                "delay of harm over delay of the task",
                "attacks",
                "seeds",
                "screened only",
            ],
            ratios,
        ),
        Table(
            "Worst case over the grid",
            [
                "model",
                "worst case",
                "where",
                "when picked",
                "useful there",
                "worst, useful or not",
                "where",
                "attacks",
            ],
            worst,
        ),
    ]
    return [table for table in tables if table.rows]


def stability(findings: Findings) -> list[Table]:
    """Every score before any attack, beside the control."""
    by = {(c.score, found.label): c for found in findings.models for c in found.stability}
    rows = []
    for score in dict.fromkeys(score for score, _ in by):
        row = [score]
        for found in findings.models:
            c = by.get((score, found.label))
            against = None if c is None else f"{c.ratio:.2f}×" if c.ratio is not None else points(c.difference)
            row += [share(c.model, score) if c else NONE]
            row += [] if found.role == "control" else [against or NONE]
        rows.append(row)
    columns = ["score before any attack"]
    for found in findings.models:
        columns += [named(found)] if found.role == "control" else [named(found), "less the control's, points"]
    return [Table("Scores before any attack", columns, rows)] if rows else []


def trainability(findings: Findings) -> list[Table]:
    """How fast each model learns a benign task that the control can learn."""
    rows = [
        [
            named(found),
            str(t.ratio or "not measurable"),
            interval(t.ratio.bootstrap) if t.ratio else NONE,
            str(t.final),
            str(t.control_final),
            points(t.difference),
            f"{t.attack}; {percent(t.before)} → {percent(t.target)}",
        ]
        for found in findings.models
        if (t := found.trainability)
    ]
    columns = [
        "model", "steps to the target, × the control's", "bootstrap over seeds", "accuracy at the end", "control's",
        "less the control's, points", "measured on; control's start → target",
    ]  # fmt: skip
    why = list(dict.fromkeys(t.why for f in findings.models if (t := f.trainability) and t.why))
    note = f"Not measurable: {'; '.join(why)}." if why else ""
    return [Table("Learning a benign task", columns, rows, note)] if rows else []


def generalisation(findings: Findings) -> list[Table]:
    """Kinds of attack other than the plain fine-tune."""
    rows = [
        [
            g.kind,
            named(found),
            str(g.worst),
            place(g),
            str(g.ratio or NONE),
            str(g.attacks),
        ]
        for kind in dict.fromkeys(g.kind for found in findings.models for g in found.generalisation)
        for found in findings.models
        for g in found.generalisation
        if g.kind == kind
    ]
    columns = ["kind", "model", "worst", "where", "steps, × the control's", "attacks"]
    return [Table("Other kinds of attack", columns, rows)] if rows else []


# -------------------------------------------------------------------------------------------------- the attacks


def every_attack(findings: Findings) -> list[Table]:
    """A row per attack and model, in the order of `findings`; a second table for those beyond FIRST attacks."""
    others = [j for j in findings.judges if j != findings.judge]
    by = {(found.label, a.attack): a for found in findings.models for a in found.attacks}
    rows = []
    for attack in findings.order[:ATTACKS_SHOWN]:
        for found in findings.models:
            if (a := by.get((found.label, attack))) is not None:
                worst = [a.worst, *(a.worst_by.get(score) for score in (*others, *findings.judged_otherwise))]
                degenerate = list(a.gibberish.values())  # where the runs passed the threshold, or at their end
                most = a.worst_by.get("degenerate")
                rows.append(
                    [
                        attack, named(found), _steps(a), _against(found, a), *(str(point or NONE) for point in worst),
                        *(_before_after(a.ends.get(score, ())) for score in (findings.task, *findings.metrics)),
                        percent(sum(degenerate) / len(degenerate)) if degenerate else NONE,
                        percent(most.value) if most else NONE,
                    ]
                )  # fmt: skip
    judge = findings.judge.partition("/")[2]
    columns = [
        "attack", "model", f"steps to {percent(findings.phi)}", "× the control's", f"worst by {judge}",
        *(f"worst by {j.partition('/')[2]}" for j in others),
        *(f"worst by {j.partition('/')[2]}, degenerate text as it judges it" for j in findings.judged_otherwise),
        *(f"{name} before → after" for name in ["task", *(m.partition("/")[2] for m in findings.metrics)]),
        f"degenerate at {percent(findings.phi)}, or at the end", "degenerate, most",
    ]  # fmt: skip
    return _split(Table("Every attack on every model", columns, rows, _left_out(findings.order)))


def paired(findings: Findings) -> list[Table]:
    """The area between the curves of model and control, on the same prompts."""
    by = {(found.label, a.attack): a.paired for found in findings.models for a in found.attacks if a.paired}
    shown = [attack for attack in findings.order if any(key[1] == attack for key in by)]
    rows = [
        [attack, m.label, points(p.difference), as_p(p.p), as_p(p.p_holm), str(p.prompts), str(p.seeds)]
        for attack in shown[:ATTACKS_SHOWN]
        for m in findings.models
        if (p := by.get((m.label, attack)))
    ]
    columns = [
        "attack", "model", "harmful, less the control's, points", "p over seeds", "p after Holm", "prompts", "seeds",
    ]  # fmt: skip
    return _split(Table("Paired comparison with the control", columns, rows, _left_out(shown)))


def agreement(findings: Findings) -> list[Table]:
    """Each pair of judges on the outputs to harmful prompts: the share they agree on, and Cohen's kappa."""
    rows = [
        [
            f"{a.first.partition('/')[2]} and {a.second.partition('/')[2]}", a.model, percent(a.share),
            "not defined" if a.kappa is None else f"{a.kappa:.2f}",
            f"{percent(a.least)} ({a.least_attack or 'no attack'})", f"{a.outputs:,}", f"{a.first_only:,}",
            f"{a.second_only:,}",
        ]
        for a in findings.agreement
    ]  # fmt: skip
    columns = [
        "judges", "model", "agree", "Cohen's kappa", "agree least", "outputs", "harmful for the first only",
        "harmful for the second only",
    ]  # fmt: skip
    return [Table("Agreement of the judges", columns, rows)] if rows else []


def inconclusive(findings: Findings) -> list[Table]:
    """Attacks that cannot be concluded from, cells that failed, and attacks that were skipped."""
    every = [a for found in findings.models for a in found.attacks if not a.harmless]  # those need not bite
    # Strong beside one model is strong. The control stands first, and its own runs speak for the rest.
    strength = {a.attack: a.strength for a in reversed(every)}
    strength |= {a.attack: a.strength for a in every if a.strength == "strong"}
    theirs = {a.attack: a.worst for a in findings.model(findings.control).attacks} if findings.control else {}
    tables = []
    for verdict, why in (
        ("too weak", f"fewer than half of the control's runs pass {percent(findings.phi)}"),
        ("barely", "half of the control's runs fall at the last step only"),
        ("control stopped", "no loss of the control was finite"),
        ("no start", f"the control is above {percent(findings.phi)} before the attack"),
    ):
        found = [attack for attack, said in strength.items() if said == verdict]
        rows = [[attack, str(theirs.get(attack, NONE))] for attack in found[:ATTACKS_SHOWN]]
        title = f"{verdict.capitalize()}: {why}"
        tables.append(Table(title, ["attack", "control's worst"], rows, _left_out(found)))
    for label, key, found in (
        ("Failed", "error", findings.failed),
        ("Stopped early", "error", findings.stopped),
        ("Skipped", "why", findings.skipped),
    ):
        rows = [
            [str(f.get("model") or NONE), str(f.get("attack") or "none"), str(f.get("seed", NONE)), str(f.get(key))]
            for f in found[:ATTACKS_SHOWN]
        ]
        tables.append(Table(label, ["model", "attack", "seed", "why"], rows, _left_out(found, label.lower())))
    return [table for table in tables if table.rows]


# -------------------------------------------------------------------------------------------------------- words


def named(found: ModelFindings) -> str:
    """'sft (control)'."""
    return found.label + (f" ({found.role})" if found.role in ("control", "reference") else "")


def place(found: Generalisation) -> str:
    """Where a worst case was found, in short: 'block 3', 'dose 1', or the attack's name."""
    dose = found.traits["dose"]
    value = found.settings.get(dose) if dose else None
    return found.attack if value is None else f"{dose} {value}"


def _kind_and_place(found: Generalisation) -> str:
    where = place(found)
    return where if where == found.attack else f"{found.kind}, {where}"


def points(difference: Difference | None) -> str:
    """'-4 [-12, 5]': a difference of shares, in percentage points."""
    if difference is None:
        return NONE
    text = _signed(difference.value)
    if difference.low is not None and difference.high is not None:
        text += f" [{_signed(difference.low)}, {_signed(difference.high)}]"
    return text


def _signed(value: float) -> str:
    rounded = round(100 * value)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"


def share(point: Point, score: str) -> str:
    """A point as it reads best: a percentage, or a plain number for perplexity and whatever is not within [0, 1]."""
    if not score.startswith("perplexity/") and 0 <= point.value <= 1:
        return str(point) if point.low is not None else percent(point.value)
    text = f"{point.value:.4g}"
    return text if point.low is None else f"{text} [{point.low:.4g}, {point.high:.4g}]"


def interval(bounds: tuple[float, float] | None) -> str:
    """'[2.2, 4.0]', of a ratio."""
    return NONE if bounds is None else f"[{number(bounds[0])}, {number(bounds[1])}]"


def _steps(attacked: Attacked) -> str:
    """'32'; with several seeds each seed's own: '16, 32, never', or 'stopped'; '–' for a kind without a curve."""
    if not attacked.strength:
        return NONE
    if all(step is None and seed not in attacked.stopped for seed, step in attacked.steps.items()):
        return f"never within {attacked.last:,}"
    missed = {seed: "stopped" if seed in attacked.stopped else "never" for seed in attacked.steps}
    return ", ".join(missed[seed] if step is None else f"{step:,}" for seed, step in attacked.steps.items())


def _against(found: ModelFindings, attacked: Attacked) -> str:
    if found.role == "control":
        return "control"
    if attacked.ratio is None and attacked.stopped:
        return "loss not finite"
    return str(attacked.ratio) if attacked.ratio else attacked.strength.replace("strong", "") or NONE


def _before_after(ends: Sequence[Point]) -> str:
    """'20 % → 95 %' of the first and the last step; one number where there is one step."""
    return " → ".join(percent(p.value) if p.is_share else f"{p.value:.3g}" for p in ends) or NONE


def _split(table: Table) -> list[Table]:
    """The rows of the first FIRST attacks, and the rest."""
    attacks = list(dict.fromkeys(row[0] for row in table.rows))
    first = set(attacks[:FIRST])
    cut = next((i for i, row in enumerate(table.rows) if row[0] not in first), len(table.rows))
    rest = Table(f"{table.label}: {len(attacks) - FIRST} more attacks", table.columns, table.rows[cut:], table.note)
    head = Table(table.label, table.columns, table.rows[:cut])
    return [t for t in (head, rest) if t.rows]


def _left_out(found: list[Any], what: str = "attacks") -> str:
    more = len(found) - ATTACKS_SHOWN
    return f"{more:,} more {what} are not shown here; --format json has them all." if more > 0 else ""
