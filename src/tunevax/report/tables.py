"""The tables of a report: strings only, so that HTML and Markdown show the same."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from statistics import fmean

from tunevax.evidence.findings import Attacked, Difference, Findings, Generalisation, ModelFindings
from tunevax.evidence.results import Point
from tunevax.evidence.words import number, percent
from tunevax.records import MARGIN
from tunevax.report.blocks import Table
from tunevax.report.text import NONE, as_p

ATTACKS_SHOWN = 40  # in tables with a row per attack and model; --format json has all
FIRST = 8  # of them on view, the others folded away
NAMES = {
    "longer": "more resistant",
    "sooner": "less resistant",
    "open": "inconclusive",
    "learns slower": "learns everything more slowly",
    "too weak": "attacks too weak",
    "no start": "control unsafe before the attack",
    "stopped": "unknown, loss not finite",
}
"""What `ModelFindings.name` means, where it is not plain."""


def _tables(label: str, rows: list[dict[str, str]], note: str = "", split: bool = False) -> list[Table]:
    """A table of the rows, by column name, if there are any; with `split` one of FIRST attacks and one of the rest."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows)) if split else []
    first = [row for row in rows if not split or row["attack"] in attacks[:FIRST]]
    rest = f"{label}: {len(attacks) - FIRST} more attacks"
    parts = ((label, first, "" if split else note), (rest, rows[len(first) :], note))
    return [Table(name, list(part[0]), [list(row.values()) for row in part], end) for name, part, end in parts if part]


def overview(findings: Findings) -> Table:
    """One row per model, one column per property that some model has."""
    rows = []
    for model in findings.models:
        lost = [(c.difference.value, c) for c in model.stability
                if c.score.startswith(("utility/", "lm-eval/")) and c.difference]  # fmt: skip
        _, least = min(lost, key=lambda pair: pair[0], default=(0.0, None))
        refused = next((c for c in model.stability if c.score == "over-refusal"), None)
        learned, control = model.trainability, model.role == "control"
        other = max(model.generalisation, key=lambda g: g.worst.value, default=None)
        rows.append({
            "model": named(model),
            "verdict": NAMES.get(model.name, model.name) or NONE,
            _to_phi(findings): "control" if control else str(model.resistance or NONE),
            "worst case": str(model.worst.point) if model.worst else NONE,
            "utility minus the control's, points":
                f"{points(least.difference)} ({least.score.partition('/')[2]})" if least else NONE,
            "harmless prompts refused": str(refused.model) if refused else NONE,
            "steps to learn a task, × the control's":
                "control" if control else NONE if learned is None else str(learned.ratio or "not measurable"),
            "worst under other kinds of attack": f"{other.worst} ({place(other, other.kind)})" if other else NONE,
        })  # fmt: skip
    shown = [c for c in rows[0] if c in ("model", "verdict") or any(row[c] not in (NONE, "control") for row in rows)]
    return Table("The four properties of each model", shown, [[row[c] for c in shown] for row in rows])


def _to_phi(findings: Findings) -> str:
    return f"steps to {percent(findings.phi)} harmful, × the control's"


def resistance(findings: Findings) -> list[Table]:
    """The ratio with the runs behind it, and the worst case with its attack."""
    ratios = [
        {
            "model": named(model), _to_phi(findings): str(r), "bootstrap over seeds": interval(r.bootstrap),
            "delay of harm over delay of the task": str(model.selectivity or NONE), "attacks": str(len(r.attacks)),
            "seeds": str(len(r.seeds)), "screened only": ", ".join(r.left_out) or NONE,
        }
        for model in findings.models if (r := model.resistance)
    ]  # fmt: skip
    worst = [
        {
            "model": named(model), "worst case": str(w.point), "attack": f"{w.attack}, step {w.point.step:,}",
            "when picked": percent(w.picked) + ("" if w.remeasured else ", not measured again"),
            "useful there": "yes" if w.conditional else "no utility measured", "worst, useful or not": str(w.any_point),
            "its attack": f"{w.any_attack}, step {w.any_point.step:,}", "attacks": str(w.attacks),
        }
        for model in findings.models if (w := model.worst)
    ]  # fmt: skip
    return _tables("Steps to the threshold, model over control", ratios) + _tables("Worst case over the grid", worst)


def stability(findings: Findings) -> list[Table]:
    """Every score before any attack, beside the control."""
    by = {(c.score, model.label): c for model in findings.models for c in model.stability}
    rows = []
    for score in dict.fromkeys(score for score, _ in by):
        row = [score]
        for model in findings.models:
            c = by.get((score, model.label))
            row.append(share(c.model, score) if c else NONE)
            if model.role != "control":
                row.append(NONE if c is None else f"{c.ratio:.2f}×" if c.ratio is not None else points(c.difference))
        rows.append(row)
    columns = ["score before any attack"]
    for model in findings.models:
        columns += [named(model)] + ["minus the control's, points"] * (model.role != "control")
    return [Table("Scores before any attack", columns, rows)] if rows else []


def trainability(findings: Findings) -> list[Table]:
    """How fast each model learns a benign task that the control can learn."""
    rows = [
        {
            "model": named(model), "steps to the target, × the control's": str(t.ratio or "not measurable"),
            "bootstrap over seeds": interval(t.ratio.bootstrap) if t.ratio else NONE,
            "accuracy at the end": str(t.final), "control's": str(t.control_final),
            "minus the control's, points": points(t.difference),
            "measured on; control's start → target": f"{t.attack}; {percent(t.before)} → {percent(t.target)}",
        }
        for model in findings.models if (t := model.trainability)
    ]  # fmt: skip
    why = list(dict.fromkeys(t.why for m in findings.models if (t := m.trainability) and t.why))
    return _tables("Learning a benign task", rows, f"Not measurable: {'; '.join(why)}." if why else "")


def generalisation(findings: Findings) -> list[Table]:
    """Kinds of attack other than the plain fine-tune."""
    every = [(g, model) for model in findings.models for g in model.generalisation]
    rows = [
        {
            "kind": g.kind, "model": named(model), "worst": str(g.worst), "where": place(g),
            "steps, × the control's": str(g.ratio or NONE), "attacks": str(g.attacks),
        }
        for kind in dict.fromkeys(g.kind for g, _ in every) for g, model in every if g.kind == kind
    ]  # fmt: skip
    return _tables("Other kinds of attack", rows)


def every_attack(findings: Findings) -> list[Table]:
    """A row per attack and model, in the order of `findings`; a second table for those beyond FIRST attacks."""
    judge, phi = findings.judge.partition("/")[2], percent(findings.phi)
    worst_by = {j: f"worst by {j.partition('/')[2]}" for j in findings.judges if j != findings.judge}
    worst_by |= {j: f"worst by {j.partition('/')[2]}, degenerate text as judged" for j in findings.judged_otherwise}
    ends = {findings.task or "": "task"} | {metric: metric.partition("/")[2] for metric in findings.metrics}
    by = {(model.label, a.attack): a for model in findings.models for a in model.attacks}
    rows = []
    for attack, model in ((a, m) for a in findings.order[:ATTACKS_SHOWN] for m in findings.models):
        if a := by.get((model.label, attack)):
            degenerate, most = a.degenerate.values(), a.worst_by.get("degenerate")
            rows.append({
                "attack": attack, "model": named(model), f"steps to {phi}": _steps(a),
                "× the control's": _against(model, a), f"worst by {judge}": str(a.worst),
                **{column: str(a.worst_by.get(score, NONE)) for score, column in worst_by.items()},
                **{f"{name} before → after": _before_after(a.ends.get(score, ())) for score, name in ends.items()},
                f"degenerate at {phi}, or at the end": percent(fmean(degenerate)) if degenerate else NONE,
                "degenerate, most": percent(most.value) if most else NONE,
            })  # fmt: skip
    return _tables("Every attack on every model", rows, _left_out(findings.order), split=True)


def paired(findings: Findings) -> list[Table]:
    """The area between the curves of model and control, on the same prompts."""
    by = {(model.label, a.attack): a.paired for model in findings.models for a in model.attacks if a.paired}
    shown = [attack for attack in findings.order if any(key[1] == attack for key in by)]
    rows = [
        {
            "attack": attack, "model": m.label, "harmful minus the control's, points": points(p.difference),
            "p over seeds": as_p(p.p), "p after Holm": as_p(p.p_holm), "prompts": str(p.prompts), "seeds": str(p.seeds),
        }
        for attack in shown[:ATTACKS_SHOWN] for m in findings.models if (p := by.get((m.label, attack)))
    ]  # fmt: skip
    return _tables("Paired comparison with the control", rows, _left_out(shown), split=True)


def margins(findings: Findings) -> list[Table]:
    """The area between the margins of model and control."""
    rows = [
        {
            "attack": m.attack, "model": model.label, "judge": m.score.partition("/")[2],
            "margin minus the control's, nats per token": nats(m.difference), "p over seeds": as_p(m.p),
            "p after Holm": as_p(m.p_holm), "seeds": str(m.seeds),
        }
        for attack in findings.order for model in findings.models for m in model.margins if m.attack == attack
    ]  # fmt: skip
    return _tables("How much the model prefers the harmful answer", rows[: 4 * ATTACKS_SHOWN], split=True)


def nats(difference: Difference) -> str:
    """'-0.42 [-0.61, -0.23]': a difference of log-odds."""
    texts = [
        f"{x:+.2f}".replace("-", "−") for x in (difference.value, difference.low, difference.high) if x is not None
    ]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def agreement(findings: Findings) -> list[Table]:
    """Each pair of judges on the outputs to harmful prompts: the share they agree on, and Cohen's kappa."""
    rows = [
        {
            "judges": f"{a.first.partition('/')[2]} and {a.second.partition('/')[2]}", "model": a.model,
            "agree": percent(a.share), "Cohen's kappa": "not defined" if a.kappa is None else f"{a.kappa:.2f}",
            "agree least": f"{percent(a.least)} ({a.least_attack or 'no attack'})", "outputs": f"{a.outputs:,}",
            "harmful by the first only": f"{a.first_only:,}", "harmful by the second only": f"{a.second_only:,}",
        }
        for a in findings.agreement
    ]  # fmt: skip
    return _tables("Agreement of the judges", rows)


def inconclusive(findings: Findings) -> list[Table]:
    """Attacks that cannot be concluded from, cells that failed, and attacks that were skipped."""
    # Harmless trainings need not do harm. An attack that is strong beside one model is strong; else the control, which
    # is first, decides.
    every = [a for model in findings.models for a in model.attacks if not a.harmless]
    strength = {a.attack: a.strength for a in reversed(every)}
    strength |= {a.attack: a.strength for a in every if a.strength == "strong"}
    theirs = {a.attack: a.worst for a in findings.baseline.attacks} if findings.baseline else {}
    phi, tables = percent(findings.phi), []
    for verdict, why in (
        ("too weak", f"fewer than half of the control's runs pass {phi}"),
        ("barely", f"half of the control's runs pass {phi} at the last step only"),
        ("control stopped", "no loss of the control was finite"),
        ("no start", f"the control is above {phi} before the attack"),
    ):
        attacks = [attack for attack, of in strength.items() if of == verdict]
        rows = [{"attack": a, "control's worst": str(theirs.get(a, NONE))} for a in attacks[:ATTACKS_SHOWN]]
        tables += _tables(f"{verdict.capitalize()}: {why}", rows, _left_out(attacks))
    missing = {"Failed": findings.failed, "Stopped early": findings.stopped, "Skipped": findings.skipped}
    for label, cells in missing.items():
        rows = [
            {"model": str(c.get("model") or NONE), "attack": str(c.get("attack") or "none"),
             "seed": str(c.get("seed", NONE)), "why": str(c.get("why" if label == "Skipped" else "error"))}
            for c in cells[:ATTACKS_SHOWN]
        ]  # fmt: skip
        tables += _tables(label, rows, _left_out(cells, label.lower()))
    return tables


def named(model: ModelFindings) -> str:
    """'sft (control)'."""
    return model.label + (f" ({model.role})" if model.role in ("control", "reference") else "")


def place(kind: Generalisation, before: str = "") -> str:
    """The attack of a worst case, in short: 'block 3' or 'dose 1', after `before`, or its name."""
    value = kind.settings.get(kind.traits["dose"] or "")
    return kind.attack if value is None else f"{before}{before and ', '}{kind.traits['dose']} {value}"


def points(difference: Difference | None) -> str:
    """'-4 [-12, 5]': a difference of shares, in percentage points."""
    if difference is None:
        return NONE
    ends = (difference.value, difference.low, difference.high)
    texts = [f"{round(100 * end):+d}".replace("-", "−").replace("+0", "0") for end in ends if end is not None]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]


def share(point: Point, score: str) -> str:
    """A point as a percentage, or as a plain number for perplexity and whatever is not within [0, 1]."""
    if not score.startswith(("perplexity/", MARGIN)) and 0 <= point.value <= 1:
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
    missed = {seed: "stopped" if seed in attacked.stopped else "never" for seed in attacked.steps}
    texts = [missed[seed] if step is None else f"{step:,}" for seed, step in attacked.steps.items()]
    return ", ".join(texts) if {*texts} - {"never"} else f"never within {attacked.last:,}"


def _against(model: ModelFindings, attacked: Attacked) -> str:
    if model.role == "control":
        return "control"
    if attacked.ratio is None and attacked.stopped:
        return "loss not finite"
    return str(attacked.ratio) if attacked.ratio else attacked.strength.replace("strong", "") or NONE


def _before_after(ends: Sequence[Point]) -> str:
    """'20 % → 95 %' of the first and the last step; one number where there is one step."""
    return " → ".join(percent(p.value) if p.is_share else f"{p.value:.3g}" for p in ends) or NONE


def _left_out(items: Sized, what: str = "attacks") -> str:
    more = len(items) - ATTACKS_SHOWN
    return f"{more:,} more {what} are not shown here; --format json has them all." if more > 0 else ""
