"""Everything that the results of an audit tell, in one call."""

from __future__ import annotations

from tunevax.errors import UsageError
from tunevax.evidence.findings import EPSILON, PHI, Findings, ModelFindings
from tunevax.evidence.properties import (
    attack_cells,
    attacked,
    generalisation,
    paired,
    resistance,
    selectivity,
    stability,
    trainability,
    worst_case,
)
from tunevax.evidence.results import Results
from tunevax.evidence.sentences import about_the_audit, caveats_on, name_of, sentence_on


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
    models = []
    for label in results.models:
        model = ModelFindings(label, results.role(label))
        model.stability = stability(results, label)
        model.attacks = [attacked(results, cell, judge, phi) for cell in attack_cells(results, label)]
        model.worst = worst_case(results, label, judge, phi, epsilon)
        model.generalisation = generalisation(results, label, judge, phi)
        if model.role != "control":
            model.resistance = resistance(results, label, judge, phi)
            model.selectivity = selectivity(results, label, judge, phi)
            model.trainability = trainability(results, label)
            paired(results, model, judge)
        models.append(model)
    findings = Findings(phi, epsilon, judge, results.control, models, [], [])
    for model in models:
        model.name = name_of(results, findings, model)
    for model in models:
        model.sentence, model.caveats = sentence_on(results, findings, model), caveats_on(results, findings, model)
    hardened = [m for m in models if m.role == "model"]
    findings.headline = [m.told for m in hardened] or [
        "Only controls were attacked, so there is no hardened model to judge."
    ]
    findings.sentences = about_the_audit(results, findings)
    return findings
