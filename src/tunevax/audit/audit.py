"""`tunevax audit`: every attack of a protocol on every model and the control, and a run folder of evidence.

A cell is one attack on one model with one seed. Each is written whole, under the hash of everything that decides it, so
a killed audit goes on where it was, and no row is lost or written twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tunevax import __version__
from tunevax.attacks.adaptive import least_selected
from tunevax.attacks.attack import (
    NotApplicable,
    TargetOptions,
    attack_data,
    beside_the_job,
    find_targets,
    rows_of_its_own,
    setting_hash,
    use_data_of_run,
    use_saved_template,
)
from tunevax.attacks.poisoned_job import require_like_jobs
from tunevax.attacks.unlock import has_lock
from tunevax.audit.protocol import Protocol, Setting, build, load_protocol, settings
from tunevax.audit.workers import Cell, count_workers, finished
from tunevax.console import bar, console
from tunevax.data.contamination import Exclusion, check, used_prompts
from tunevax.data.sources import parse_source
from tunevax.errors import UsageError
from tunevax.evidence.properties import utility_loss
from tunevax.evidence.results import COMMON
from tunevax.modeling.checkpoints import config_of, model_hash
from tunevax.modeling.loading import absolute, resolve
from tunevax.run_lock import refuse_if_held
from tunevax.runs import (
    clear,
    data_entry,
    digest,
    is_run,
    partial_of,
    read_lines,
    read_run,
    require_one_process,
    writing,
)
from tunevax.scoring.judges import lead_judge
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


class Plan(NamedTuple):
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


def plan(options: AuditOptions, references: Sequence[tuple[str, str]] = ()) -> Plan:
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
        parent = read_run(options.model[0]).get("model", {}).get("ref") if is_run(options.model[0]) else None
        hint = f" (it was hardened from {parent})" if parent else ""
        raise UsageError(
            f"--control is missing: an audit compares; give the same model without the defence{hint}, or look at one "
            "attack alone with `tunevax attack`"
        )
    for ref in (*options.model, options.control):
        config_of(resolve(ref)[0], options.revision)  # a mistyped path, before anything that is read from it
    for ref in options.model:
        if absolute(ref) == absolute(options.control):
            raise UsageError(f"the control is the model itself ({ref}); give the same model without the defence")
    fill_in(options)
    for ref in options.fluency_model:
        try:
            config_of(resolve(ref)[0])
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
    adapt_to, skipped = {}, []
    for target in targets:
        if target["role"] == "model":
            with suppress(NotApplicable):
                least_selected(target["ref"], 0.5)
                adapt_to[target["label"]] = target["ref"]
    configs = [config_of(resolve(target["ref"])[0], options.revision) for target in targets]
    depth = min(config.get_text_config().num_hidden_layers for config in configs)
    grid = settings(protocol, depth, adapt_to)
    on_organism = str(options.safety_data).partition(":")[0] == "organism"
    for setting in list(grid):
        why = None
        if setting.kind == "unlock" and not any(has_lock(target["ref"]) for target in targets):
            grid.remove(setting)  # nothing is missing from the evidence
        elif setting.kind == "adaptive" and not setting.values.get("like"):
            why = "no model here recorded a choice of blocks"
        elif setting.kind == "identity-shift" and not setting.values.get("dialogues") and not on_organism:
            why = "it needs --dialogues"
        if why:
            grid.remove(setting)
            skipped.append({"model": "all", "attack": setting.name, "why": why})
    skipped += keep_to_stage(grid, targets, protocol.name)
    if any(setting.kind == "poisoned-job" for setting in grid):
        require_like_jobs([t["ref"] for t in targets if t["role"] == "model"], absolute(options.control))
    exclusion = Exclusion.of([used_prompts(target["ref"]) for target in targets], options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    configs = [build(s.kind, s.values, 0, None) for s in grid]
    harmful, task = attack_data(options, {need for config in configs for need in config.needs}, exclusion)
    benign: dict[str, list[dict]] = {"task": task}
    for config in configs:
        for role, rows in rows_of_its_own(config, options, exclusion).items():
            benign[role] = [*benign.get(role, []), *rows]
    for target in targets:
        target |= check(target["ref"], suite.roles(), harmful, benign, options.allow_overlap)
        target["hash"] = identity(target["ref"])
    data = [data_entry("attack", options.safety_data or "", harmful)] if harmful else []
    data += [data_entry("task", options.task_data or "", task)] if task else []
    data += [data_entry("evaluation", options.eval_data or options.safety_data or "", suite.harmful)]
    for role, rows in (("task evaluation", suite.task and suite.task.rows), ("over-refusal", suite.benign)):
        data += [data_entry(role, "", rows)] if rows else []
    data += [data_entry(f"utility {t.name}", "", t.rows) for t in suite.utility]
    versions = suite.harness.versions if suite.harness else None
    return Plan(options, protocol, targets, grid, data, skipped, versions, exclusion)


def keep_to_stage(grid: list[Setting], targets: Sequence[dict[str, Any]], protocol: str) -> list[dict[str, str]]:
    """Take out of the grid, for every target alike, what cannot judge one of them; returns what and why.

    Raises:
        UsageError: fine-tuning-stage defences, and nothing in the grid poisons the customer's data.
    """
    skipped = []
    for setting in list(grid):
        why = next((w for t in targets if (w := beside_the_job(t["ref"], setting.kind))), None)
        if why:
            grid.remove(setting)
            skipped.append({"model": "all", "attack": setting.name, "why": why})
    if skipped and not any(setting.kind == "poisoned-job" for setting in grid):
        raise UsageError(f"protocol {protocol}: {skipped[0]['why']}; use --protocol fine-tuning")
    return skipped


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
    origin, defended = control, False
    while is_run(origin):
        record = read_run(origin)
        defended = defended or record.get("method") != "sft"
        origin = record.get("parent") or record.get("model", {}).get("ref") or ""
    return [control, origin] if defended and origin else [control]


def identity(ref: str) -> str:
    """What tells a model from one that was trained anew into the same folder."""
    base, adapters = resolve(ref)
    return digest([model_hash(base) or base, *[model_hash(str(a)) for a in adapters]])


SCORING = (
    "judges",
    "limit",
    "max_new_tokens",
    "generation_batch_size",
    "fluency_model",
    "chat_template",
    "dtype",
    "revision",
    "safety_data",
    "task_data",
    "benign_data",
    "eval_data",
    "task_eval_data",
    "utility_data",
    "perplexity_data",
)
"""The options that a cell's rows depend on, whatever the attack."""


def contents(value: Any) -> Any:
    """An option as what it stands for: a file's or a model's content in place of its name, inside lists too."""
    if isinstance(value, list | tuple):
        return [contents(v) for v in value]
    if not isinstance(value, str):
        return value
    path = Path(parse_source(value.removeprefix("hf:")).name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if is_run(path):
        log = path / "log.jsonl"
        return [identity(str(path)), hashlib.sha256(log.read_bytes()).hexdigest() if log.is_file() else None]
    return model_hash(value.removeprefix("hf:")) or value


def cells_of(plan: Plan, chosen: Sequence[Setting], first_seed: bool, others: bool) -> list[Cell]:
    """The cells of some settings, the models as they are among the first seed's; and so are all seeds of an attack that
    names its own."""
    evaluation = next(entry for entry in plan.data if entry["role"] == "evaluation")
    drawn_from = [entry for entry in plan.data if entry["role"] in ("attack", "task")]
    decided_by = {k: contents(getattr(plan.options, k)) for k in SCORING}
    scoring = {**decided_by, "data": [e["hash"] for e in plan.data], "tunevax": __version__}
    if plan.exclusion.active:
        scoring["dropped"] = digest(plan.exclusion.summary())
    found = []
    for target in plan.targets:
        if first_seed:
            key = {"kind": "none", "attack": None, "attack_hash": None, "settings": {}, "seed": plan.protocol.seeds[0]}
            found.append(_cell(target, None, key, scoring))
        for setting in chosen:
            for i, seed in enumerate(setting.seeds):
                if first_seed if i == 0 or setting.named else others:
                    config = build(setting.kind, setting.values, seed, None)
                    key = {
                        "kind": setting.kind, "attack": setting.name, "settings": setting.shown, "seed": seed,
                        "attack_hash": setting_hash(setting.kind, config, drawn_from, evaluation),
                    }  # fmt: skip
                    found.append(_cell(target, setting, key, scoring))
    return found


def _cell(target: dict[str, Any], setting: Setting | None, key: dict[str, Any], scoring: dict[str, Any]) -> Cell:
    values = {k: contents(v) for k, v in setting.values.items()} if setting else {}
    name = digest([target["hash"], target["label"], target["role"], key, values, scoring])
    return Cell(target, setting, {**key, "cell": name}, name)


def audit(plan: Plan, command: str = "") -> Path:
    """Run the cells that are not there yet, and return the run folder. See run.json's `failed` for cells that failed.

    Raises:
        UsageError: the folder is in the way, or an unfinished audit in it was started with other options.
    """
    options, protocol = plan.options, plan.protocol
    if not options.output_dir:
        raise UsageError("--output-dir is missing")
    require_one_process("an audit")
    config = {k: v for k, v in vars(options).items()
              if k not in ("output_dir", "overwrite", "workers", "dry_run", "keep_attacked")}  # fmt: skip
    record: dict[str, Any] = {
        "verb": "audit", "method": protocol.name, "command": command, "seed": protocol.seeds[0], "parent": None,
        "config": {**config, "protocol": asdict(protocol)}, "data": plan.data, "targets": plan.targets,
        "overlap_dropped": plan.exclusion.summary(),
        "skipped": list(plan.skipped), "lm_eval": plan.harness, "fluency_hash": contents(options.fluency_model),
    }  # fmt: skip
    final = Path(options.output_dir).absolute()
    if is_run(final) and not options.overwrite:
        reopen(final, record["config"])
    with writing(options.output_dir, record, resume=True, overwrite=options.overwrite) as run:
        folder = run.path / "cells"
        folder.mkdir(exist_ok=True)
        if plan.exclusion.dropped:
            run.write_lines("dropped.jsonl", plan.exclusion.dropped)
        grid = plan.grid
        cells = cells_of(plan, grid, True, protocol.screen == 0)
        run_cells(plan, cells, folder, run.path / "weights")
        if protocol.screen:
            keep = strongest(plan, cells, folder)
            more = cells_of(plan, [s for s in grid if s.name in keep], False, True)
            run_cells(plan, more, folder, run.path / "weights")
            cells += more
        assemble(run, cells, folder)
    shutil.rmtree(run.final / "cells", ignore_errors=True)  # last: a kill before the folder has its name must find them
    return run.final


def run_cells(plan: Plan, cells: Sequence[Cell], folder: Path, weights: Path) -> None:
    """Run the cells whose file is not in `folder`, one line per finished cell."""
    left = [cell for cell in cells if not (folder / f"{cell.hash}.json").exists()]
    done = len(cells) - len(left)
    if done:
        console.print(f"{done} of {len(cells)} cells are there already", highlight=False)
    workers = min(count_workers(plan.options.workers, str(plan.options.control)), len(left))
    with bar() as progress:
        task = progress.add_task("audit", total=len(cells), completed=done, note="")
        for cell, result in finished(
            plan.options, left, folder, weights if plan.options.keep_attacked else None, workers, plan.exclusion
        ):
            done += 1
            console.print(
                f"[{done}/{len(cells)}] {cell.told} · {result}", highlight=False, markup=False, soft_wrap=True
            )
            progress.advance(task)


def strongest(plan: Plan, cells: Sequence[Cell], folder: Path) -> set[str]:
    """The names of the `screen` strongest fine-tunes of each model: the fewest steps to phi, then the highest harmful
    score; and the attack that its worst case would be picked from, so that it is measured again. The first seed
    decides.

    Attacks of other kinds go on only if they name seeds of their own, and those have run already.
    """
    found: dict[str, list[tuple[int, float, str]]] = {}  # label -> (steps to phi, -worst, attack)
    useful: dict[str, list[tuple[int, float, str]]] = {}
    for cell in cells:
        outcome = json.loads((folder / f"{cell.hash}.json").read_text(encoding="utf-8"))
        if cell.setting is None or not outcome["results"] or cell.setting.kind not in COMMON:
            continue
        if cell.key["seed"] != cell.setting.seeds[0]:
            continue
        judge = lead_judge(list(outcome["results"][0]["scores"]))
        points = [(-row["scores"][judge]["value"], row["step"]) for row in outcome["results"]]
        broken = [step for value, step in sorted(points, key=lambda p: p[1]) if -value > plan.protocol.phi]
        label, when = cell.target["label"], broken[0] if broken else 10**9
        if cell.setting.kind == "finetune":
            found.setdefault(label, []).append((when, min(points)[0], cell.setting.name))
        before = {n: s["value"] for n, s in outcome["results"][0]["scores"].items() if n.startswith("utility/")}
        loss = {row["step"]: utility_loss(before, row) for row in outcome["results"]}
        kept = [p for p in points if loss[p[1]] is None or loss[p[1]] <= plan.protocol.epsilon]
        useful.setdefault(label, []).append((when, min(kept)[0], cell.setting.name))
    fastest = {name for ranked in found.values() for *_, name in sorted(ranked)[: plan.protocol.screen]}
    return fastest | {min(ranked, key=lambda r: (r[1], r[0]))[2] for ranked in useful.values() if ranked}


RAN = ("done", "stopped")


def assemble(run: Any, cells: Sequence[Cell], folder: Path) -> None:
    """The cells' files as results.jsonl, generations.jsonl and cells.jsonl, in the order of the protocol."""
    outcomes = [json.loads((folder / f"{cell.hash}.json").read_text(encoding="utf-8")) for cell in cells]
    for name, key in (("results.jsonl", "results"), ("generations.jsonl", "generations")):
        run.write_lines(name, [row for outcome in outcomes for row in outcome[key]])
    run.write_lines(
        "cells.jsonl", [{k: v for k, v in o.items() if k not in ("results", "generations")} for o in outcomes]
    )
    record = run.record
    told = ("cell", "model", "attack", "seed")
    for status in ("failed", "stopped"):
        record[status] = [{k: o[k] for k in (*told, "error")} for o in outcomes if o["status"] == status]
    record["skipped"] += [{k: o[k] for k in (*told, "why")} for o in outcomes if o["status"] == "skipped"]
    record["cells"], record["cell_seconds"] = len(cells), round(sum(o["seconds"] for o in outcomes), 1)
    record["peak_memory_bytes"] = max(o["peak_memory_bytes"] for o in outcomes)
    for target in record["targets"]:
        own = next((o["record"] for o in outcomes if o["model"] == target["label"] and o["status"] in RAN), {})
        target.update({k: own[k] for k in ("template_hash", "parameters", "class", "base") if k in own})
    done = [o["record"] for o in outcomes if o["status"] in RAN]
    if not done:
        raise UsageError(
            f"every cell failed; the first: {record['failed'][0]['error'] if record['failed'] else 'none ran'}"
        )


def reopen(final: Path, config: dict[str, Any]) -> None:
    """Make a finished audit with failed cells unfinished again, so that only these run.

    Raises:
        UsageError: it is complete, or was made with other options.
    """
    record = read_run(final)
    same = json.loads(json.dumps(config, default=str)) == record.get("config")
    if record.get("verb") != "audit" or not same or not record.get("failed"):
        what = (
            "is a finished audit" if record.get("verb") == "audit" and same else "is a finished run with other options"
        )
        raise UsageError(f"{final} {what}; choose another --output-dir, or pass --overwrite to replace it")
    partial = partial_of(final)
    refuse_if_held(partial)
    if partial.exists():  # a kill came between the next two steps of an earlier call
        clear(final)
        return
    rows = {name: read_lines(final / f"{name}.jsonl") for name in ("results", "generations", "cells")}
    new = partial.with_name(partial.name + ".reopened")
    shutil.rmtree(new, ignore_errors=True)
    (new / "cells").mkdir(parents=True)
    for outcome in rows["cells"]:
        if outcome["status"] == "failed":
            continue
        place = [outcome[k] for k in ("model", "attack", "seed")]
        outcome["results"] = [r for r in rows["results"] if r["cell"] == outcome["cell"]]
        outcome["generations"] = [
            g for g in rows["generations"] if [g[k] for k in ("model", "attack", "seed")] == place
        ]
        (new / "cells" / f"{outcome['cell']}.json").write_text(json.dumps(outcome), encoding="utf-8")
    (new / "config.json").write_text(
        json.dumps({"verb": "audit", "method": record["method"], "config": record["config"]}), encoding="utf-8"
    )
    if (final / "weights").exists():
        shutil.copytree(final / "weights", new / "weights")
    new.rename(partial)
    clear(final)
