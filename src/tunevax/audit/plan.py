"""Planning an audit: its options, the targets and data they name, and all that can be checked before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tunevax.attacks.context import TargetOptions, attack_data, find_targets, use_data_of_run, use_saved_template
from tunevax.attacks.kind import only_through_the_service
from tunevax.audit.protocol import Protocol, Setting, build, load_protocol, settings
from tunevax.data.contamination import Exclusion, check
from tunevax.errors import UsageError
from tunevax.lineage import Lineage, absolute
from tunevax.modeling.checkpoints import config_of
from tunevax.records import data_entry
from tunevax.scoring.suite import build_suite, labels_of


@dataclass
class AuditOptions(TargetOptions):
    """What `tunevax audit` takes. Data, judges and the like default to those of the protocol, then to what the first
    hardened run recorded. The command line reads the protocol's; in Python it is
    `AuditOptions(protocol=NAME, **load_protocol(NAME).scoring, ...)`."""

    control: str | None = field(
        default=None, metadata={"help": "the same model without the defence, attacked identically; an audit needs one"}
    )
    fluency_model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "language models; what surprises each is gibberish; default the control, and, if it is a defence "
            "itself, what it began as; none: off"
        },
    )
    judges: list[str] = field(
        default_factory=list,
        metadata={
            "help": "refusal-keywords, organism, hf:MODEL; several are shown side by side, two at least are wanted"
        },
    )
    protocol: str = field(
        default="quick", metadata={"help": "paper, quick, standard, durability, fine-tuning, or a YAML file"}
    )
    dialogues: str | None = field(
        default=None, metadata={"help": "dialogues of the identity-shift attacks: JSONL with `messages`"}
    )
    controls: list[str] = field(
        default_factory=list,
        metadata={
            "help": "also attack: undefended, equal-compute, equal-steps, equal-updates, random-perturbation (trained "
            "into OUT.controls)"
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
    workers: int = field(
        default=0, metadata={"help": "processes; 0 is one per GPU, and without one as many as cores for a small model"}
    )
    dry_run: bool = field(default=False, metadata={"help": "list the cells, with time and memory, and stop"})
    keep_attacked: bool = field(default=False, metadata={"help": "keep the attacked weights, one folder per cell"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; it must be 0 or more")


class AuditPlan(NamedTuple):
    """An audit before it runs: options with their defaults filled in, the protocol, the targets and the data.
    `exclusion` is what --drop-overlap leaves out of every cell."""

    options: AuditOptions
    protocol: Protocol
    targets: list[dict[str, Any]]
    grid: list[Setting]
    data: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    harness: dict[str, Any] | None
    exclusion: Exclusion = Exclusion()


def plan(options: AuditOptions, references: Sequence[tuple[str, str]] = ()) -> AuditPlan:
    """Check everything that can be checked before hours are spent.

    Args:
        references: (label, ref) of further controls, attacked in the same way.

    Raises:
        UsageError: a bad protocol, model or data source; a control that is missing or the model itself; shared prompts.
    """
    protocol = load_protocol(options.protocol)
    if options.dialogues:
        protocol.defaults = {**protocol.defaults, "dialogues": options.dialogues}
    if not options.model:
        raise UsageError("--model is missing")
    if options.control is None or options.control == "none":
        parent = Lineage.of(options.model[0]).parent
        hint = f" (it was hardened from {parent})" if parent else ""
        raise UsageError(
            f"--control is missing: an audit compares; give the same model without the defence{hint}, or look at one "
            "attack alone with `tunevax attack`"
        )
    for ref in (*options.model, options.control):
        config_of(Lineage.of(ref).base, options.revision)  # a mistyped path, before anything that is read from it
    for ref in options.model:
        if absolute(ref) == absolute(options.control):
            raise UsageError(f"the control is the model itself ({ref}); give the same model without the defence")
    fill_in(options)
    for ref in options.fluency_model:
        try:
            config_of(Lineage.of(ref).base)
        except UsageError as error:
            raise UsageError(f"{error}; it should tell gibberish, name another with --fluency-model") from error
    targets = find_targets(options.model, options.control)
    if len({t["ref"] for t in targets}) < len(targets):
        raise UsageError("a model is named twice; name each --model once")
    further = {absolute(ref): label for label, ref in references}  # two runs may share an undefended model
    for target in targets:
        further.pop(target["ref"], None)
    labels = labels_of([t["label"] for t in targets] + list(further.values()))[len(targets) :]
    targets += [{"label": n, "role": "reference", "ref": ref} for n, ref in zip(labels, further, strict=True)]
    use_saved_template(options, targets)
    configs = [config_of(Lineage.of(target["ref"]).base, options.revision) for target in targets]
    depth = min(config.get_text_config().num_hidden_layers for config in configs)
    grid, skipped = applicable(settings(protocol, depth, targets), targets, options)
    exclusion = Exclusion.of([Lineage.of(target["ref"]).prompts for target in targets], options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    configs = [build(s.kind, s.values, 0, None) for s in grid]
    harmful, task = attack_data(options, {need for config in configs for need in config.needs}, exclusion)
    benign: dict[str, list[dict]] = {"task": task}
    for config in configs:
        for role, rows in config.kept_rows(options, exclusion).items():
            benign[role] = [*benign.get(role, []), *rows]
    for target in targets:
        target |= check(target["ref"], suite.roles(), harmful, benign, options.allow_overlap)
        target["hash"] = Lineage.of(target["ref"]).identity
    data = [data_entry("attack", options.safety_data or "", harmful)] if harmful else []
    data += [data_entry("task", options.task_data or "", task)] if task else []
    data += [data_entry("evaluation", options.eval_data or options.safety_data or "", suite.harmful)]
    for role, rows in (("task evaluation", suite.task and suite.task.rows), ("over-refusal", suite.benign)):
        data += [data_entry(role, "", rows)] if rows else []
    data += [data_entry(f"utility {t.name}", "", t.rows) for t in suite.utility]
    versions = suite.harness.versions if suite.harness else None
    return AuditPlan(options, protocol, targets, grid, data, skipped, versions, exclusion)


def applicable(
    grid: Sequence[Setting], targets: Sequence[dict[str, Any]], options: AuditOptions
) -> tuple[list[Setting], list[dict[str, str]]]:
    """The attacks that can judge these models, for every target alike; and what is left out, with the reason.

    Raises:
        UsageError: fine-tuning-stage defences, and no attack poisons the customer's data.
    """
    kept, skipped, poisoned = [], [], False
    for setting in grid:
        kind = build(setting.kind, setting.values, 0, None)
        if why := kind.applies(targets, options):
            skipped.append({"model": "all", "attack": setting.name, "why": why})
        else:
            kept.append(setting)
            poisoned = poisoned or (kind.customer and kind.curve)
    if not poisoned and (why := only_through_the_service(targets)) in [s["why"] for s in skipped]:
        raise UsageError(f"protocol {options.protocol}: {why}; use --protocol fine-tuning")
    return kept, skipped


def fill_in(options: AuditOptions) -> None:
    """Data that were not named: those of the first hardened run; on the organism, all that it offers."""
    use_data_of_run(options)
    if options.safety_data is None:
        raise UsageError("--safety-data is missing: harmful rows for the attacks, and prompts to score on")
    if options.safety_data.partition(":")[0] == "organism":
        options.task_data = options.task_data or "organism"
        options.benign_data = options.benign_data or "organism"
        options.utility_data = options.utility_data or ["organism:set=benign"]
        options.judges = options.judges or ["organism", "refusal-keywords"]
    options.judges = options.judges or ["refusal-keywords"]
    if not options.fluency_model:
        options.fluency_model = fluency_models(str(options.control))
    elif options.fluency_model == ["none"]:
        options.fluency_model = []


def fluency_models(control: str) -> list[str]:
    """Who tells gibberish: the control, which speaks the language of answers, refusals included. If a defence is in its
    history, then also the model that began it: RepNoise makes harmful answers so unlikely that the real ones of an
    attacked model would pass for gibberish, and harm for safety."""
    lineage = Lineage.of(control)
    return [control, lineage.origin] if lineage.defences else [control]
