"""All findings from the results of an audit: first the numbers, then the words."""

from __future__ import annotations

from tunevax.errors import UsageError
from tunevax.evidence import properties
from tunevax.evidence.about import about_the_audit, limits
from tunevax.evidence.caveats import caveats_on
from tunevax.evidence.findings import EPSILON, PHI, AsJudged, Attacked, Findings, ModelFindings
from tunevax.evidence.judges import agreement
from tunevax.evidence.ratios import robustness
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
    findings.headline = [m.summary for m in findings.models if m.role == "model"] or [
        "Only controls were attacked, so there is no hardened model to judge."
    ]
    findings.sentences, findings.limits = about_the_audit(findings), limits(findings)
    return findings


def _model(results: Results, label: str, judge: str, phi: float, epsilon: float) -> ModelFindings:
    """The numbers of one model."""
    model = ModelFindings(label, results.roles[label], before=properties.untouched(results, label))
    model.stability = properties.stability(results, label)
    model.attacks = [_attacked(results, cell, judge, phi) for cell in results.of(label)]
    model.worst = properties.worst_case(results, label, judge, phi, epsilon)
    model.generalisation = properties.generalisation(results, label, judge, phi)
    if model.role == "control":
        return model
    model.resistance = properties.resistance(results, label, judge, phi)
    model.by_judge = {other: properties.resistance(results, label, other, phi) for other in results.judges[1:]}
    model.as_judged = _as_judged(results, label, judge, phi)
    model.selectivity = properties.selectivity(results, label, judge, phi)
    model.trainability = properties.trainability(results, label)
    properties.paired(results, model, judge)
    return model


def _attacked(results: Results, cell: Cell, judge: str, phi: float) -> Attacked:
    """One attack on one model, with every score that a table shows of it."""
    one = properties.attacked(results, cell, judge, phi)
    others = [other for other in results.judges if other != judge] + [_judged(other) for other in results.judges]
    one.worst_by = {score: point for score in (*others, "degenerate") if (point := cell.worst(score))}
    one.degenerate_at_end = cell.at("degenerate", one.last)
    for score in [results.task] * bool(results.task) + results.metrics:
        if score and (curve := cell.curve(score)):
            one.ends[score] = (*curve[:1], *curve[1:][-1:])
    return one


def _judged(judge: str) -> str:
    """The score that counts degenerate text as the judge judges it."""
    return judge.replace("harmful/", "judged/", 1)


def _judged_otherwise(results: Results) -> list[str]:
    pairs = [(judge, _judged(judge)) for judge in results.judges]
    return [own for judge, own in pairs if any(c.curve(own) and c.curve(judge) != c.curve(own) for c in results.cells)]


def _as_judged(results: Results, label: str, judge: str, phi: float) -> AsJudged | None:
    own = _judged(judge)
    if not all(c.curve(own) for c in results.cells if c.curve(judge)):
        return None
    more = [
        (b.value - a.value, c.attack)
        for c in results.cells if c.model == label and c.attack is not None
        for a, b in zip(c.curve(judge), c.curve(own), strict=True)
    ]  # fmt: skip
    return AsJudged(properties.resistance(results, label, own, phi), *max(more, default=(0.0, None)))


def strongest(results: Results, judge: str, phi: float) -> list[str]:
    """All attacks, first the fine-tune that the control (without one: the first model) resists least."""
    model = results.control or results.models[0]

    def order(attack: str) -> tuple[bool, float, float]:
        cell = results.cell(model, attack) or results.under(attack)[0]
        return not cell.has_curve, *robustness(cell, judge, phi)

    return sorted(results.attacks, key=order)
