"""Planning an audit: its options, targets and data, and every check that is possible before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from tunevax.attacks.context import TargetOptions, attack_data, find_targets, use_data_of_run, use_saved_template
from tunevax.attacks.kind import only_through_the_service
from tunevax.audit.protocol import Protocol, Setting, build, load_protocol, settings
from tunevax.data.contamination import Exclusion, Rows, check
from tunevax.errors import UsageError, require
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import option, require_given
from tunevax.modeling.checkpoints import config_of
from tunevax.records import CellSummary, DataEntry, Target, data_entry
from tunevax.scoring.suite import Suite, build_suite, labels_of


@dataclass
class AuditOptions(TargetOptions):
    """Options of `tunevax audit`. Data, judges and the like default to the protocol's, then to those of the first
    hardened run. In Python: `AuditOptions(protocol=NAME, **load_protocol(NAME).scoring, ...)`."""

    control: str | None = option(None, "the same model without the defence; an audit needs one", decides="cells")
    fluency_model: list[str] = option(
        [],
        "language models that detect degenerate text; default the control, and its origin if it has a defence; or none",
    )
    judges: list[str] = option([], "refusal-keywords, organism, hf:MODEL; at least two are recommended")
    protocol: str = option("quick", "paper, quick, standard, durability, fine-tuning, or a YAML file", decides="cells")
    dialogues: str | None = option(None, "of the identity-shift attacks: JSONL with `messages`", decides="cells")
    controls: list[str] = option(
        [],
        "also attack: undefended, equal-compute, equal-steps, equal-updates, random-perturbation (in OUT.controls)",
        decides="cells",
    )
    output_dir: str | None = option(None, "the run folder to write", decides="nothing")
    workers: int = option(0, "processes; 0 is one per GPU, or up to four for a small model on a CPU", decides="nothing")
    dry_run: bool = option(False, "list the cells, with time and memory, and stop", decides="nothing")
    keep_attacked: bool = option(False, "keep the attacked weights, one folder per cell", decides="nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "workers", at_least=0)


class AuditPlan(NamedTuple):
    """An audit before it runs.

    Attributes:
        options: with all defaults filled in.
        targets: the control, the models, and references attacked in the same way.
        grid: the attacks that apply. skipped: the others, with the reason.
        data: the datasets, for run.json.
        suite: what the models are evaluated on, built once for the process.
        harmful: rows of the attacks. benign: rows of the attacks by role, of which `task` is the benign task.
        exclusion: prompts that --drop-overlap leaves out of every cell.
    """

    options: AuditOptions
    protocol: Protocol
    targets: list[Target]
    grid: list[Setting]
    skipped: list[CellSummary]
    data: list[DataEntry]
    suite: Suite
    harmful: Rows
    benign: dict[str, Rows]
    exclusion: Exclusion


def plan(options: AuditOptions) -> AuditPlan:
    """Plan an audit, and check everything that can be checked before it runs. Raises `UsageError`: a bad protocol,
    model or data source; a control that is missing or the model itself; shared prompts."""
    protocol = load_protocol(options.protocol)
    if options.dialogues:
        protocol = replace(protocol, defaults={**protocol.defaults, "dialogues": options.dialogues})
    require_given(options, "model")
    if options.control is None or options.control == "none":
        parent = Lineage.of(options.model[0]).parent
        hint = f" (it was hardened from {parent})" if parent else ""
        raise UsageError(
            f"--control is missing: an audit compares; give the same model without the defence{hint}, or look at one "
            "attack alone with `tunevax attack`"
        )
    for ref in (*options.model, options.control):
        config_of(Lineage.of(ref).base, options.revision)  # a mistyped path, before anything is read from it
    for ref in options.model:
        if absolute(ref) == absolute(options.control):
            raise UsageError(f"the control is the model itself ({ref}); give the same model without the defence")
    options = fill_in(options)
    for ref in options.fluency_model:
        try:
            config_of(Lineage.of(ref).base)
        except UsageError as error:
            raise UsageError(f"{error}; it should detect degenerate text, name another with --fluency-model") from error
    targets = find_targets(options.model, options.control)
    if len({t["ref"] for t in targets}) < len(targets):
        raise UsageError("a model is named twice; name each --model once")
    options = use_saved_template(options, targets)
    grid, skipped = applicable(protocol, targets, options)
    exclusion = Exclusion.of([Lineage.of(target["ref"]).prompts for target in targets], options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    configs = [build(s.kind, s.values, 0, None) for s in grid]
    harmful, task = attack_data(options, {need for config in configs for need in config.needs}, exclusion)
    benign: dict[str, Rows] = {"task": task}
    for config in configs:
        for role, rows in config.kept_rows(options, exclusion).items():
            benign[role] = [*benign.get(role, []), *rows]
    sources = {"attack": options.safety_data, "task": options.task_data}
    sources["evaluation"] = options.eval_data or options.safety_data
    parts = {"attack": harmful, "task": task, **suite.roles()}
    data = [data_entry(role, sources.get(role) or "", rows) for role, rows in parts.items() if rows]
    planned = AuditPlan(options, protocol, [], grid, skipped, data, suite, harmful, benign, exclusion)
    return planned._replace(targets=[_checked(planned, target) for target in targets])


def with_references(planned: AuditPlan, references: Sequence[tuple[str, str]]) -> AuditPlan:
    """The plan with further controls, (label, ref) each, except those that are targets already: two runs may have been
    hardened from one model. Raises `UsageError`: one was trained on a prompt of the suite."""
    known = [target["ref"] for target in planned.targets]
    further = {absolute(ref): label for label, ref in references if absolute(ref) not in known}
    labels = labels_of([*(t["label"] for t in planned.targets), *further.values()])[len(known) :]
    added: list[Target] = [{"label": n, "role": "reference", "ref": r} for n, r in zip(labels, further, strict=True)]
    targets = [*planned.targets, *(_checked(planned, target) for target in added)]
    grid, skipped = applicable(planned.protocol, targets, planned.options)
    return planned._replace(targets=targets, grid=grid, skipped=skipped)


def _checked(planned: AuditPlan, target: Target) -> Target:
    """The target with its identity, and with the prompts that it shares with the audit."""
    allow = planned.options.allow_overlap
    shared = check(target["ref"], planned.suite.roles(), planned.harmful, planned.benign, allow)
    return cast(Target, {**target, **shared, "hash": Lineage.of(target["ref"]).identity})


def applicable(
    protocol: Protocol, targets: Sequence[Target], options: AuditOptions
) -> tuple[list[Setting], list[CellSummary]]:
    """The attacks that apply to these models, the same for every target; and the others, with the reason. Raises
    `UsageError`: there are fine-tuning-stage defences, but no attack poisons the customer's data."""
    configs = [config_of(Lineage.of(target["ref"]).base, options.revision) for target in targets]
    depth = min(config.get_text_config().num_hidden_layers for config in configs)
    kept: list[Setting] = []
    skipped: list[CellSummary] = []
    poisoned = False
    for setting in settings(protocol, depth, targets):
        kind = build(setting.kind, setting.values, 0, None)
        if why := kind.applies(targets, options):
            skipped.append({"model": "all", "attack": setting.name, "why": why})
        else:
            kept.append(setting)
            poisoned = poisoned or (kind.customer and kind.curve)
    if not poisoned and (why := only_through_the_service(targets)) in [s["why"] for s in skipped]:
        raise UsageError(f"protocol {options.protocol}: {why}; use --protocol fine-tuning")
    return kept, skipped


def fill_in(options: AuditOptions) -> AuditOptions:
    """The options with defaults: the data of the first hardened run, on the organism all of its data and judges, and
    the fluency models."""
    options = use_data_of_run(options)
    if options.safety_data is None:
        raise UsageError("--safety-data is missing: harmful rows for the attacks, and prompts to score on")
    if options.safety_data.partition(":")[0] == "organism":
        options = replace(
            options,
            task_data=options.task_data or "organism",
            benign_data=options.benign_data or "organism",
            utility_data=options.utility_data or ["organism:set=benign"],
            judges=options.judges or ["organism", "refusal-keywords"],
        )
    fluency = options.fluency_model or fluency_models(str(options.control))
    return replace(
        options, judges=options.judges or ["refusal-keywords"], fluency_model=[] if fluency == ["none"] else fluency
    )


def fluency_models(control: str) -> list[str]:
    """The models that detect degenerate text: the control, which models answers and refusals alike. If it has a defence
    in its history, also the model that it began as: RepNoise makes harmful answers so improbable that those of an
    attacked model would count as degenerate, and harm as safety."""
    lineage = Lineage.of(control)
    return [control, lineage.origin] if lineage.defences else [control]
