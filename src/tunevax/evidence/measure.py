"""Everything that the results of an audit show, in one call: first all numbers, then the words."""

from __future__ import annotations

from tunevax.errors import UsageError
from tunevax.evidence.about import about_the_audit, limits
from tunevax.evidence.caveats import caveats_on
from tunevax.evidence.findings import EPSILON, PHI, AsJudged, Attacked, Findings, ModelFindings
from tunevax.evidence.judges import agreement
from tunevax.evidence.properties import (
    attacked,
    generalisation,
    paired,
    resistance,
    selectivity,
    stability,
    trainability,
    untouched,
    worst_case,
)
from tunevax.evidence.ratios import withstood
from tunevax.evidence.results import Cell, Results
from tunevax.evidence.sentences import sentence_on
from tunevax.evidence.verdict import name_of


def measure(results: Results, phi: float = PHI, epsilon: float = EPSILON) -> Findings:
    """All properties of all models.

    Args:
        phi: harmful score to pass, in (0, 1).
        epsilon: loss of utility up to which an attacked model counts as useful, in [0, 1].

    Raises:
        UsageError: phi or epsilon out of range.
    """
    if not 0 < phi < 1:
        raise UsageError(f"phi, the harmful score to pass, is {phi}; it must be between 0 and 1")
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon, the loss of utility that is allowed, is {epsilon}; it must be between 0 and 1")
    judge = results.judges[0]
    curves = {len(c.rows) for c in results.cells if c.has_curve}
    findings = Findings(
        phi, epsilon, judge, results.control, [_model(results, label, judge, phi, epsilon) for label in results.models],
        judges=results.judges, agreement=agreement(results), judged_otherwise=_judged_otherwise(results),
        task=results.task, metrics=results.metrics, order=strongest(results, judge, phi),
        outputs_kept=any(c.generations for c in results.cells),
        repeats=sorted(curves or {len(c.rows) for c in results.cells}),
        failed=results.failed, skipped=results.skipped, stopped=results.stopped,
    )  # fmt: skip
    for model in findings.models:
        model.name = name_of(findings, model)
    for model in findings.models:
        model.sentence, model.caveats = sentence_on(findings, model), caveats_on(findings, model)
    findings.headline = [m.told for m in findings.models if m.role == "model"] or [
        "Only controls were attacked, so there is no hardened model to judge."
    ]
    findings.sentences, findings.limits = about_the_audit(findings), limits(findings)
    return findings


def _model(results: Results, label: str, judge: str, phi: float, epsilon: float) -> ModelFindings:
    """All that is measured of one model."""
    model = ModelFindings(label, results.role(label), before=untouched(results, label))
    model.stability = stability(results, label)
    model.attacks = [_attacked(results, cell, judge, phi) for cell in results.of(label)]
    model.worst = worst_case(results, label, judge, phi, epsilon)
    model.generalisation = generalisation(results, label, judge, phi)
    if model.role == "control":
        return model
    model.resistance = resistance(results, label, judge, phi)
    model.by_judge = {other: resistance(results, label, other, phi) for other in results.judges[1:]}
    model.as_judged = _as_judged(results, label, judge, phi)
    model.selectivity = selectivity(results, label, judge, phi)
    model.trainability = trainability(results, label)
    paired(results, model, judge)
    return model


def _attacked(results: Results, cell: Cell, judge: str, phi: float) -> Attacked:
    """One attack on one model, with every score that a table shows of it."""
    found = attacked(results, cell, judge, phi)
    others = [other for other in results.judges if other != judge]
    own = [other.replace("harmful/", "judged/", 1) for other in results.judges]
    worst = {score: point for score in (*others, *own, "degenerate") if (point := cell.worst(score))}
    found.worst_by, found.degenerate_at_end = worst, cell.at("degenerate", found.last)
    for score in ([results.task] if results.task else []) + results.metrics:
        if curve := cell.curve(score):
            found.ends[score] = (*curve[:1], *curve[1:][-1:])
    return found


def _judged_otherwise(results: Results) -> list[str]:
    pairs = [(judge, judge.replace("harmful/", "judged/", 1)) for judge in results.judges]
    return [own for judge, own in pairs if any(c.curve(own) and c.curve(judge) != c.curve(own) for c in results.cells)]


def _as_judged(results: Results, label: str, judge: str, phi: float) -> AsJudged | None:
    own = judge.replace("harmful/", "judged/", 1)
    if not all(c.curve(own) for c in results.cells if c.curve(judge)):
        return None
    more = [
        (b.value - a.value, c.attack)
        for c in results.cells if c.model == label and c.attack is not None
        for a, b in zip(c.curve(judge), c.curve(own), strict=True)
    ]  # fmt: skip
    return AsJudged(resistance(results, label, own, phi), *max(more, default=(0.0, None)))


def strongest(results: Results, judge: str, phi: float) -> list[str]:
    """All attacks, first the fine-tune that the control (without one: the first model) withstands least."""
    model = results.control or results.models[0]

    def order(attack: str) -> tuple[bool, float, float]:
        cell = results.cell(model, attack) or results.under(attack)[0]
        return not cell.has_curve, *withstood(cell, judge, phi)

    return sorted(results.attacks, key=order)
