"""The content of a report, section by section, and its two readable forms: one HTML file, and Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tunevax.console import as_bytes, as_time
from tunevax.evidence.findings import DEGENERATE_HIGH, LEARNED, Findings, percent
from tunevax.evidence.results import CURVES, Cell, Results, own_verdict
from tunevax.report import provenance as pv
from tunevax.report import tables as tb
from tunevax.report.blocks import HeatMap, Section, Table
from tunevax.report.provenance import Provenance, Run

PANELS = 8  # figures of one sort on view, the attacks that the control withstands least first
FOLDED = 12  # further ones, folded away; the rest is counted
SAMPLES = 2  # harmful prompts shown per model and step, the same ones for every model
SAMPLED = 6  # models whose outputs are shown
SPLIT = 6  # examples where the judges disagree
LONGEST = 480  # characters of one output; the rest is counted, not shown
CONFIG = 2_000  # characters of one value of a configuration
NOTES = 12  # sentences of one list

NOTHING = "These runs hold no attack and no score: nothing here says how safe a model is."
NOT_ENOUGH = (
    "These runs hold no attack, and scores only of a choice or an analysis: nothing here says how safe a model is."
)
WEAK = (
    "This is a weak attack setting, kept for comparison with published numbers only: it says nothing about an attacker "
    "who tries."
)


@dataclass
class Content:
    """All that a page says.

    Attributes:
        headlines: (sentence, caveats), one per hardened model. sentences: on the whole.
        label: a warning that belongs on top, or ''.
    """

    headlines: list[tuple[str, list[str]]]
    sentences: list[str]
    label: str
    sections: list[Section]
    provenance: Provenance
    several_seeds: bool = False
    phi: str = ""
    threshold: float = 0.0


def content(results: Results | None, findings: Findings | None, provenance: Provenance, figures: bool) -> Content:
    """The content of a report; without `figures` for a form that cannot show them. No results: what the runs did."""
    from tunevax.report import stages

    staged = stages.sections(provenance, figures)
    if results is None or findings is None:
        found = [*staged, *(_hardening(provenance) if figures else [])]
        told = cut([*stages.told(provenance), *provenance.notes])
        return Content([(nothing(provenance), [])], told, "", [s for s in found if s], provenance)
    judged = [(m.sentence, m.caveats) for m in findings.models if m.role == "model"]
    sections = [
        Section("The four properties", _overview_text(findings), tables=[tb.overview(results, findings)]),
        Section(
            "Resistance",
            "How many times the control's attack steps a model takes to pass the threshold, over the attacks that are "
            "strong enough to conclude from; and the worst that any attack of the grid did to it, among those that "
            "left it useful, measured again with seeds that did not pick it.",
            tables=tb.resistance(results, findings),
            titled=True,
        ),
        Section("Stability", "What the hardening itself changed.", tables=tb.stability(results, findings)),
        Section(
            "Trainability",
            "A model worth releasing learns a benign task as fast as the control.",
            tables=tb.trainability(results, findings),
        ),
        Section(
            "Generalisation",
            "The worst that each other kind of attack did, and where.",
            tables=tb.generalisation(results, findings),
        ),
    ]
    order = tb.strongest(results, findings)
    if figures:
        sections += [*_figures(results, findings, order), *_other_kinds(results, findings), *_hardening(provenance)]
    sections += [
        Section(
            "Learning rate by steps",
            "Worst harmful score so far, in percent, of the attacks of kind finetune, by learning rate and step.",
            maps=tb.heat_maps(results, findings),
        ),
        Section(
            "Every attack",
            "The attacks that the control withstands least come first.",
            tables=tb.every_attack(results, findings, order),
            fold=True,
        ),
        Section(
            "The same prompts, model and control",
            "How much more, or less, often the model's output is harmful than the control's, mean over the evaluated "
            "steps: the area between their curves. Intervals and p over seeds (paired t), and with Holm's correction.",
            tables=tb.paired(results, findings, order),
            fold=True,
        ),
        _judges(results, findings, order),
        *staged,
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
            tables=tb.inconclusive(results, findings),
            titled=True,
        ),
        Section("What this page cannot tell", points=[*tb.limits(results, findings), *pv.limits(provenance)]),
    ]  # fmt: skip
    return Content(
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
    from tunevax.report import stages

    return NOT_ENOUGH if stages.scored(provenance) else NOTHING


def _overview_text(findings: Findings) -> str:
    control = f" The control is {findings.control}." if findings.control else ""
    judge = findings.judge.partition("/")[2]
    return f"Coherent harm by the judge “{judge}”: degenerate text is not harm. Brackets are 95 % intervals.{control}"


def cut(sentences: list[str]) -> list[str]:
    """Each sentence once, at most NOTES of them; the rest is counted."""
    kept = list(dict.fromkeys(sentences))
    return (
        kept if len(kept) <= NOTES else [*kept[:NOTES], f"{len(kept) - NOTES:,} more remarks stand in --format json."]
    )


# ---------------------------------------------------------------------------------------------------- figures


def _figures(results: Results, findings: Findings, order: list[str]) -> list[Section]:
    """Curves per attack, in the order given."""
    from tunevax.report import figures as fig

    look, judge, task, phi = _look(results), findings.judge, results.task, findings.phi
    under = {a: [c for c in results.under(a) if c.kind in CURVES and len(c.steps) > 1] for a in order}
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
    """Intervention over blocks and roll-back over doses."""
    from tunevax.report import figures as fig

    panels = []
    for kind, setting, told in (
        ("intervention", "block", "intervention: a trained edit of one block's input, all weights frozen"),
        ("roll-back", "dose", "roll-back: what the hardening added, subtracted"),
    ):
        series = tb.profiles(results, findings, kind, setting)
        if series:
            panels.append((told, fig.profile(kind, series, setting, _look(results), findings.phi)))
    return [Section("Attacks without fine-tuning", "Worst harmful score; whiskers are 95 % intervals.", panels=panels)]


def _look(results: Results) -> dict[str, dict[str, Any]]:
    from tunevax.report import figures as fig

    return fig.styles(results.models, results.control)


def _hardening(provenance: Provenance) -> list[Section]:
    """What the align runs recorded: the blocks that were hardened, and what it cost."""
    from tunevax.report import figures as fig

    aligned = provenance.aligned
    maps = [(label, fig.layer_map(f"map{i}", label, run)) for i, (label, run) in enumerate(aligned)]
    bars = [("wall time", "wall_seconds"), ("peak memory", "peak_memory_bytes")] if aligned else []
    return [
        Section(
            "Which layers were hardened",
            "Sampling probability of each block over training (more colour, more likely) and the blocks that were "
            "perturbed (dots, whose area is a share where several steps meet).",
            panels=[(label, svg) for label, svg in maps if svg][:PANELS],
        ),
        Section(
            "What the hardening cost",
            f"As the runs measured it{_hardware_differs([run for _, run in aligned])}. Peak memory: all that is live "
            "in one step, weights included; on an accelerator, the allocator's.",
            panels=[
                (name, fig.bars(key, [_bar(label, run, key) for label, run in aligned], name)) for name, key in bars
            ],
        ),
    ]


def _bar(label: str, run: Run, key: str) -> tuple[str, float | None, str]:
    value = run.info.get(key)
    if not isinstance(value, int | float):
        return label, None, "not measured"
    if key == "peak_memory_bytes":
        return label, value, as_bytes(value)
    steps = run.info.get("steps")
    return label, value, as_time(value) + (f", {steps:,} steps" if isinstance(steps, int) else "")


def _hardware_differs(runs: list[Run]) -> str:
    kinds = {str(sorted((run.info.get("hardware") or {}).items(), key=str)) for run in runs}
    return "; the runs used different hardware, so their bars do not compare" if len(kinds) > 1 else ""


# ----------------------------------------------------------------------------------------- judges and samples


def _judges(results: Results, findings: Findings, order: list[str]) -> Section:
    """How far the judges agree, and the first outputs on which they do not, one per model and way of disagreeing."""
    examples: list[dict[str, Any]] = []
    for model in results.models if len(results.judges) > 1 else []:
        ways: dict[tuple, dict[str, Any]] = {}
        for cell in [c for a in [*order, None] if (c := results.cell(model, a))]:
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
        tables=tb.agreement(results, findings),
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


def to_html(page: Content) -> str:
    """One self-contained file, without scripts or requests."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("tunevax.report", "")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"numbers": _numbers, "shown": shown, "svg": _markup, "value": _value, "percentage": tb.cell_text}
    return env.get_template("page.html.j2").render(
        page=page,
        chains=[(label, [pv.links(chain) for chain in found]) for label, found in page.provenance.chains.items()],
        measurements=[pv.facts(run) for run in page.provenance.measurements],
        commands=commands(page.provenance),
        degenerate_high=percent(DEGENERATE_HIGH),
    )


def commands(provenance: Provenance) -> list[str]:
    """The commands that made these results, each once."""
    return list(dict.fromkeys(str(r.info["command"]) for r in provenance.runs if r.info.get("command")))


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _numbers(text: Any) -> Any:
    """Escaped text in which neither 't-vaccine' nor '98 % [88, 100]' breaks, and intervals are marked up."""
    from markupsafe import Markup, escape

    safe = str(escape(visible(str(text)))).replace(" %", "\u00a0%")
    safe = re.sub(
        r"(?<=[\d%×]) \[([+−\d.,]+|0), ([+−\d.,]+|∞)\]", '\u00a0<span class="iv">[\\1,\u00a0\\2]</span>', safe
    )
    safe = re.sub(r"(?<![\w\-/.&;])[\w.]{1,12}(?:-[\w.]{1,12}){1,2}(?![\w\-/])", r'<span class="nb">\g<0></span>', safe)
    return Markup(safe)


def _value(value: Any) -> str:
    text = visible(str(value))
    return text if len(text) <= CONFIG else f"{text[:CONFIG]}… ({len(text) - CONFIG:,} more characters)"


def shown(text: str) -> str:
    """Text of a model or judge, cut to LONGEST characters, control and direction characters made visible."""
    left = len(text) - LONGEST
    return visible(text[:LONGEST]) + (f"… ({left:,} more characters)" if left > 0 else "")


def visible(text: str) -> str:
    """Text whose control and direction characters can be seen, and cannot reorder what stands around them."""
    return "".join(
        chr(0x2400 + ord(c))
        if ord(c) < 32 and c not in "\n\t"
        else "\ufffd"
        if c in "\u200e\u200f\u061c" or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" or 0x7F <= ord(c) < 0xA0
        else c
        for c in text
    )


# --------------------------------------------------------------------------------------------------- Markdown


def to_markdown(page: Content) -> str:
    """The sentences and tables as plain Markdown."""
    lines = ["# tunevax report", ""]
    lines += [f"**{_escaped(page.label)}**", ""] if page.label else []
    for sentence, caveats in page.headlines:
        lines += [_escaped(sentence), "", *(f"- {_escaped(c)}" for c in caveats), *([""] if caveats else [])]
    lines += [*(f"- {_escaped(s)}" for s in page.sentences), ""]
    for section in page.sections:
        lines += [f"## {_escaped(section.title)}", "", *([_escaped(section.text), ""] if section.text else [])]
        lines += [*(f"- {_escaped(p)}" for p in section.points), *([""] if section.points else [])]
        heat = [_heat_table(m) for m in section.maps]
        for table in [*heat, *section.tables]:
            lines += _table(table)
        for group in section.outputs:
            lines += [f"### {_escaped(group['title'])}", ""]
            for column in group["columns"]:
                lines += _outputs(column)
        lines += [_escaped(section.note), ""] if section.note else []
    lines += ["## Do it again", "", *(f"    {visible(command)}" for command in commands(page.provenance)), ""]
    for label, found in page.provenance.chains.items():
        told = " | ".join(" ← ".join(link.name if isinstance(link, Run) else link for link in c) for c in found)
        lines.append(f"- {_escaped(label)}: {_escaped(told)}")
    return "\n".join(lines).rstrip() + "\n"


def _heat_table(heat: HeatMap) -> Table:
    rows = [[rate, *map(tb.cell_text, row)] for rate, row in zip(heat.rates, heat.cells, strict=True)]
    return Table(f"{heat.model}, by learning rate and step", ["learning rate", *map(str, heat.steps)], rows)


def _table(table: Table) -> list[str]:
    if not table.rows:
        return []
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    told = ["| " + " | ".join(c if c == "---" else _escaped(c) for c in row) + " |" for row in rows]
    return [f"**{_escaped(table.label)}**", "", *told, "", *([_escaped(table.note), ""] if table.note else [])]


def _outputs(column: dict[str, Any]) -> list[str]:
    lines = [_escaped(column["title"]), ""] if column["title"] else []
    for s in column["samples"]:
        about = [text for text in (s["kind"], s["category"]) if text]
        marks = "; ".join(
            about + [f"{name}: {verdict}" for name, verdict, _ in s["marks"]] + ["degenerate"] * s["degenerate"]
        )
        lines += [f"- {_escaped(shown(s['prompt']))}", f"  - {_escaped(shown(s['response']) or '(empty)')}"]
        lines += [f"  - ({_escaped(shown(marks))})"]
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", visible(text)).strip()
    text = re.sub(r"[\\`*_<>|&~$#!]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(:\[])", r"\\]", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    text = re.sub(r"^[-+=](?=\s|$|[-=])", r"\\\g<0>", text)
    return text.replace("://", ":\\//").replace("www.", "www\\.")
