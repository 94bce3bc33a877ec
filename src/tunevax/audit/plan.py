"""Planning an audit: its options, targets, data and cells, and every check that is possible before it runs.

A cell is one attack on one model with one seed, named by the hash of everything that decides it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from tunevax import __version__
from tunevax.attacks.context import TargetOptions, attack_data, find_targets, use_data_of_run, use_saved_template
from tunevax.attacks.kind import only_through_the_service
from tunevax.audit.protocol import Protocol, Setting, build, load_protocol, settings
from tunevax.data.contamination import Exclusion, Rows, check
from tunevax.data.sources import contents
from tunevax.errors import UsageError, require
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import deciding, option, require_given
from tunevax.modeling.checkpoints import config_of
from tunevax.proxy import is_proxy
from tunevax.records import CellSummary, DataEntry, Target, Traits, data_entry, digest
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
    judges: list[str] = option([], "refusal-keywords, forced-choice, proxy, organism, hf:MODEL; two or more")
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
    """An audit before it runs."""

    options: AuditOptions  # with all defaults filled in
    protocol: Protocol
    targets: list[Target]  # the control, the models, and references attacked in the same way
    grid: list[Setting]  # the attacks that apply
    skipped: list[CellSummary]  # the others, with the reason
    data: list[DataEntry]  # the datasets, for run.json
    suite: Suite  # what the models are evaluated on, built once for the process
    harmful: Rows  # of the attacks
    benign: dict[str, Rows]  # of the attacks by role, of which `task` is the benign task
    exclusion: Exclusion  # prompts that --drop-overlap leaves out of every cell


def plan(options: AuditOptions) -> AuditPlan:
    """Plan an audit, and check everything that can be checked before it runs. Raises `UsageError`: a bad protocol,
    model or data source; a control that is missing or the model itself; shared prompts."""
    protocol = load_protocol(options.protocol)
    if options.dialogues:
        protocol = replace(protocol, defaults={**protocol.defaults, "dialogues": options.dialogues})
    require_given(options, "model")
    if options.control in (None, "none"):
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
    benign = defaultdict[str, Rows](list, task=task)
    for role, rows in (item for config in configs for item in config.kept_rows(options, exclusion).items()):
        benign[role] = [*benign[role], *rows]
    evaluated = options.eval_data or options.safety_data
    sources = {"attack": options.safety_data, "task": options.task_data, "evaluation": evaluated}
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
    rows = planned.suite.roles(), planned.harmful, planned.benign
    shared = check(target["ref"], *rows, planned.options.allow_overlap)
    return cast(Target, {**target, **shared, "hash": Lineage.of(target["ref"]).identity})


def applicable(
    protocol: Protocol, targets: Sequence[Target], options: AuditOptions
) -> tuple[list[Setting], list[CellSummary]]:
    """The attacks that apply to these models, the same for every target; and the others, with the reason. Raises
    `UsageError`: there are fine-tuning-stage defences, but no attack poisons the customer's data."""
    configs = [config_of(Lineage.of(target["ref"]).base, options.revision) for target in targets]
    depth = min(config.get_text_config().num_hidden_layers for config in configs)
    kinds = [(setting, build(setting.kind, setting.values, 0, None)) for setting in settings(protocol, depth, targets)]
    why_not = {setting.name: kind.applies(targets, options) for setting, kind in kinds}
    kept = [setting for setting, _ in kinds if not why_not[setting.name]]
    skipped: list[CellSummary] = [{"model": "all", "attack": name, "why": why} for name, why in why_not.items() if why]
    poisoned = any(kind.customer and kind.curve for setting, kind in kinds if not why_not[setting.name])
    if not poisoned and (why := only_through_the_service(targets)) in [s["why"] for s in skipped]:
        raise UsageError(f"protocol {options.protocol}: {why}; use --protocol fine-tuning")
    return kept, skipped


def fill_in(options: AuditOptions) -> AuditOptions:
    """The options with defaults: the data of the first hardened run, on the organism and on a proxy topic all of their
    data and judges, and the fluency models."""
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
    elif is_proxy(source := options.safety_data):
        options = replace(
            options,
            benign_data=options.benign_data or source,
            utility_data=options.utility_data or [source],
            judges=options.judges or ["proxy", "refusal-keywords"],
        )
    fluency = options.fluency_model or fluency_models(str(options.control))
    fluency, judges = [] if fluency == ["none"] else fluency, options.judges or ["refusal-keywords"]
    return replace(options, judges=judges, fluency_model=fluency)


def fluency_models(control: str) -> list[str]:
    """The models that detect degenerate text: the control, which models answers and refusals alike. If it has a defence
    in its history, also the model that it began as: RepNoise makes harmful answers so improbable that those of an
    attacked model would count as degenerate, and harm as safety."""
    lineage = Lineage.of(control)
    return [control, lineage.origin] if lineage.defences else [control]


class AuditCell(NamedTuple):
    """One attack on one model with one seed."""

    target: Target
    setting: Setting | None  # the attack; None scores the model as it is
    key: dict[str, Any]  # fields of all its rows
    hash: str  # of the model, the attack, the seed and the data: the name of its file

    @property
    def summary(self) -> str:
        """Model, attack and seed, for progress messages."""
        attack = f"{self.setting.name} · seed {self.key['seed']}" if self.setting else "as it is"
        return f"{self.target['label']} · {attack}"


def cells_of(plan: AuditPlan, chosen: Sequence[Setting], first_seed: bool, others: bool) -> list[AuditCell]:
    """The cells of the settings `chosen`: with the first seed, which includes the models as they are and all seeds of
    attacks that name their own; with the other seeds; or both."""
    evaluation = next(entry for entry in plan.data if entry["role"] == "evaluation")
    drawn_from = [entry for entry in plan.data if entry["role"] in ("attack", "task")]
    decided_by = {name: contents(value) for name, value in deciding(plan.options, "rows").items()}
    scoring = {**decided_by, "data": [e["hash"] for e in plan.data], "tunevax": __version__}
    if plan.exclusion.active:
        scoring["dropped"] = digest(plan.exclusion.summary())
    runs: list[tuple[Setting | None, dict[str, Any], Traits, dict[str, Any]]] = []
    if first_seed:
        seed = plan.protocol.seeds[0]
        runs.append((None, {"kind": "none", "attack": None, "attack_hash": None, "settings": {}, "seed": seed}, {}, {}))
    for setting in chosen:
        values = {k: contents(v) for k, v in setting.values.items()}
        for i, seed in enumerate(setting.seeds):
            if first_seed if i == 0 or setting.named else others:
                config = build(setting.kind, setting.values, seed, None)
                hashed = config.setting_hash(setting.kind, drawn_from, evaluation)
                key = {"kind": setting.kind, "attack": setting.name, "settings": setting.shown, "seed": seed}
                runs.append((setting, {**key, "attack_hash": hashed}, config.traits, values))
    cells = []
    for target in plan.targets:
        for attack, key, traits, values in runs:
            name = digest([target["hash"], target["label"], target["role"], key, values, scoring])
            shown = {"traits": traits} if traits else {}
            cells.append(AuditCell(target, attack, {**key, **shown, "cell": name}, name))
    return cells
