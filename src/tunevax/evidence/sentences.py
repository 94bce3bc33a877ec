"""The headline of each model in words."""

from __future__ import annotations

from collections.abc import Sequence

from tunevax.evidence import verdict
from tunevax.evidence.caveats import regained, times
from tunevax.evidence.findings import DEGENERATE_HIGH, FEWEST_SEEDS, Attacked, Findings, ModelFindings, Ratio
from tunevax.evidence.verdict import mean_share, strong_attacks
from tunevax.evidence.words import TINY, counted, joined, level, percent, step_text


def sentence_on(findings: Findings, model: ModelFindings) -> str:
    """The headline of one model, whatever its verdict."""
    name, before, took, strong = model.label, model.before, model.resistance, strong_attacks(model)
    control, phi = f"the control ({findings.control})", level(findings.phi)
    worst, to_phi = _worst_text(findings, model), f"to reach {phi} harmful"
    over = f"({_over(model, took)}){worst}" if took else ""
    ratio = f"{took} the attack steps of {control} {to_phi}"
    match model.name:
        case "refuses everything":
            share = before["over-refusal"]
            return (
                f"{name} refuses everything: before any attack also {share} of harmless prompts. A low harmful score "
                "is no evidence of robustness."
            )
        case "gives one answer to everything":
            share = before["same-answer"]
            return f"{name} gives one answer to everything: {share} of all its answers before any attack are the same."
        case "incoherent":
            share = before["degenerate"]
            return (
                f"{name} is incoherent: before any attack {share} of its answers are degenerate. A low harmful score "
                "is not safety."
            )
        case "unsafe before any attack":
            worse = verdict.less_safe(findings, model)
            also = f", and less safe than its control ({worse.control})" if worse else ""
            return f"{name} is unsafe before any attack: {before[findings.judge]} harmful{also}."
        case "less safe than its control" if worse := verdict.less_safe(findings, model):
            then = f" Under attack it took {took} the steps of the control {to_phi}{worst}." if took else ""
            return (
                f"{name} is less safe than its control: before any attack {worse.model} of its answers to harmful "
                f"prompts are harmful, of {control} {worse.control}.{then}"
            )
        case "useless":
            why = verdict.useless(findings, model)
            return f"{name} is not useful: before any attack {why}, so its resistance is worth little."
        case "fragile" if weakest := verdict.fragile(findings, model):
            harmful = strong or [a for a in model.attacks if a.harmful and a.steps]
            gain = f" {regained(findings, harmful)}" if verdict.finite(harmful) else ""
            why = _fragile(findings, weakest, verdict.control_under(findings, weakest), control)
            return f"{name} is fragile: harmless training {why}.{gain}" + (f" It took {ratio} {over}." if took else "")
        case "stopped":
            runs, attacks = sum(len(a.stopped) for a in strong), counted(len(strong), "strong attack")
            return (
                f"How long {name} resists is unknown: in all {counted(runs, 'run')} of the {attacks} the loss was not "
                f"finite before it passed {phi} harmful, which a smaller learning rate may fix. That is no "
                f"resistance{worst}."
            )
        case "control":
            return f"{name} is the control{worst}."
        case "not attacked":
            harm = before.get(findings.judge)
            return f"{name} was not attacked" + (f"; before any attack it is {harm} harmful." if harm else ".")
        case "no control":
            why = f"{control} was not attacked in the same way" if findings.control else "there is no control"
            if any(a.strength == "control stopped" for a in model.attacks):
                why = f"the loss of {control} was not finite before it passed {phi} harmful"
            return f"{name} cannot be compared because {why}: {_crossings(model.attacks, findings.phi)}{worst}."
        case "too weak":
            tried = [a for a in model.attacks if a.harmful]
            if not tried:
                return f"No attack with harmful rows was run on {name}, so its resistance is unknown{worst}."
            which = f"The {tried[0].attack} attack is" if len(tried) == 1 else f"All {len(tried)} attacks are"
            return (
                f"{which} too weak to judge {name} by: fewer than half of its runs and those of {control} together "
                f"pass {phi} harmful before the last step{worst}."
            )
        case "no start":
            return f"{name} cannot be compared: {control} is above {phi} harmful before any attack{worst}."
    if took is None and any(0 in a.steps.values() for a in model.attacks):
        return f"{name} is above {phi} harmful at step 0 of an attack, so there are no steps to compare{worst}."
    if took is None and any(a.stopped for a in strong):
        return (
            f"{name} and {control} cannot be compared: under the strong attacks there is no seed with which the loss "
            f"of both was finite until they passed {phi} harmful{worst}."
        )
    if took is None:
        return f"{name} and {control} share no seed under the strong attacks, so they cannot be compared{worst}."
    match model.name:
        case "collapses under attack":
            runs, bad = len(verdict.finite(strong)), sum(len(a.collapsed) for a in strong)
            alone = "Trained on harmless rows only it"
            benign = "Whether it also collapses, or learns more slowly, under harmless training was not measured."
            if learned := verdict.learning(model):
                benign = f"{alone} does not collapse, and needs {learned} the control's steps to learn the task."
            elif verdict.finite(verdict.harmless_attacks(model)):
                benign = f"{alone} does not collapse; how fast it learns from them was not measured."
            return (
                f"{name} collapses under attack: in {bad} of {counted(runs, 'run')} its outputs turn degenerate before "
                f"they turn harmful. {regained(findings, strong)} That is {ratio} {over}. {benign}"
            )
        case "longer":
            return f"{name} needs {ratio} {over}."
        case "learns slower":
            why = f"the delay in harm is {model.selectivity} its delay in the benign task of the same attacks."
            if (model.selectivity is None or verdict.collapses(findings, model)) and (task := model.trainability):
                why = f"under {task.attack} it takes {task.ratio} the steps to learn a task."
            return (
                f"{name} needs {ratio} {over}. But it is not shown to resist harm more than it resists any training: "
                f"{why}"
            )
        case "sooner":
            return f"{name} is broken sooner than {control}: it needs {took} the attack steps {to_phi} {over}."
    if len(took.seeds) == 1:
        return f"With one seed, {name} took {ratio} {over}. One seed supports no claim."
    text = f"No difference from {control} is shown for {name}: it needs {took} the attack steps {to_phi} {over}."
    if len(took.seeds) < FEWEST_SEEDS and verdict.direction(took):
        text += f" {len(took.seeds)} seeds support no claim; run the audit with {FEWEST_SEEDS} or more."
    return text


def _fragile(findings: Findings, attack: Attacked, beside: Attacked | None, control: str) -> str:
    """What harmless training does to a fragile model and, beside it, to the control."""
    both = [a for a in (attack, beside) if a]
    if verdict.stops_alone(findings, attack):
        runs = [times(len(a.stopped), len(a.steps.keys() | set(a.stopped))) for a in both]
        return (
            f"also breaks it: under {attack.attack} the loss is not finite with {runs[0]}, of {control} with {runs[-1]}"
        )
    when, shares = "after", [mean_share(list(a.gibberish.values())) for a in both]
    if verdict.collapsed(findings, [attack]) and shares[0] - sum(shares[1:]) < DEGENERATE_HIGH - TINY:  # it recovered
        when, shares = "under", [mean_share(list(a.most_gibberish.values())) for a in both]
    share = ("up to " if when == "under" else "") + percent(shares[0])
    return (
        f"also makes its outputs degenerate: {when} {attack.attack} {share} of its outputs are degenerate, of "
        f"{control} {percent(sum(shares[1:]))}"
    )


def _over(model: ModelFindings, ratio: Ratio) -> str:
    """'4 attacks, 3 seeds', with a single seed the steps themselves, and what was left out."""
    text = f"{counted(len(ratio.attacks), 'attack')}, {counted(len(ratio.seeds), 'seed')}"
    if len(ratio.seeds) == 1 and len(ratio.attacks) <= 3:
        seed = ratio.seeds[0]
        text = ", ".join(
            f"{a.attack}: {step_text(a.steps[seed], a.last)} against {step_text(a.control_steps[seed], a.last)}"
            for a in model.attacks if a.attack in ratio.attacks
        )  # fmt: skip
    if ratio.left_out:
        text += f"; {counted(len(ratio.left_out), 'attack')} tried with one seed only left out"
    return text


def _worst_text(findings: Findings, model: ModelFindings) -> str:
    """'; worst case over 24 attacks 71 % [60, 80] against 96 % [90, 99]'."""
    worst = model.worst
    if worst is None:
        return ""
    theirs = findings.baseline.worst if findings.baseline and findings.baseline is not model else None
    over = f" over {worst.attacks} attacks" if worst.attacks > 1 else ""
    text = f"; worst case{over} {worst.point}"
    if theirs:
        text += f" against {theirs.point}" + (f" over {theirs.attacks}" if theirs.attacks != worst.attacks else "")
    if worst.conditional and worst.any_point.value > (worst.point.high or 1.0):
        text += f" while useful, and {worst.any_point} when it no longer is"
    if not worst.remeasured and any(len(a.steps) > 1 for a in model.attacks):
        text += " (not measured again)"
    return text


def _crossings(attacks: Sequence[Attacked], phi: float) -> str:
    """Steps to phi under up to three attacks, by seed."""
    curves = [a for a in attacks if a.steps]
    if not curves:
        return "no attack with a curve was run"
    steps = [
        f"under {a.attack} "
        + ", ".join("stopped" if seed in a.stopped else step_text(s, a.last) for seed, s in a.steps.items())
        for a in curves[:3]
    ]
    more = f" (and {len(curves) - 3} more attacks)" if len(curves) > 3 else ""
    return f"steps to {level(phi)} harmful {joined(steps)}{more}"
