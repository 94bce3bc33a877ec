"""`tunevax attack`: one attack on every model and the control, evaluated along the way, as a run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tunevax.attacks import context
from tunevax.attacks.kind import AttackKind
from tunevax.data.contamination import Exclusion, check
from tunevax.environment import require_one_process
from tunevax.errors import UsageError
from tunevax.mixins import option, require_given
from tunevax.records import DROPPED, GENERATIONS, RESULTS, Generation, Row, RunRecord, Target, data_entry, is_run
from tunevax.runs import writing
from tunevax.scoring.suite import build_suite


@dataclass
class AttackOptions(context.TargetOptions):
    """The options of `tunevax attack` besides the attacker's own."""

    name: str | None = option(None, "what the report calls this attack; default the output folder")
    keep_weights: bool = option(False, "keep the attacked weights of --model (default: deleted)")
    resume: bool = option(False, "continue an unfinished run at the first model without results")


def attack(method: str, options: AttackOptions, config: AttackKind, command: str = "") -> Path:
    """Attack every model and the control identically, evaluating along the way, and return the run folder.

    Args:
        config: the attacker's options, of the kind `method`; `output_dir` is the run folder.

    Raises:
        UsageError: bad data, model or options; prompts shared between alignment, attack and evaluation.
    """
    require_given(options, "model")
    require_given(config, "output_dir")
    folder = str(config.output_dir)
    require_one_process("an attack")
    options = context.use_data_of_run(options)
    if options.keep_weights and (len(options.model) > 1 or getattr(config, "trainable", None) not in ("lora", "full")):
        raise UsageError("--keep-weights takes one --model, and --trainable lora or full")
    options = dataclasses.replace(options, control=options.control or config.default_control)
    targets = context.find_targets(options.model, options.control)
    if why := config.applies(targets, options):
        raise UsageError(f"the {method} attack does not apply: {why}")
    used = [config.used(target["ref"]) for target in targets]
    exclusion = Exclusion.of(used, options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    harmful, task = context.attack_data(options, config.needs, exclusion)
    own = config.kept_rows(options, exclusion)
    options = context.use_saved_template(options, targets)
    for target, before in zip(targets, used, strict=True):
        shared = check(target["ref"], suite.roles(), harmful, {"task": task, **own}, options.allow_overlap, used=before)
        target |= cast(Target, shared)
    first = next(t["ref"] for t in targets if t["role"] == "model")
    name = options.name or Path(folder).name
    evaluation = data_entry("evaluation", options.eval_data or options.safety_data or "", suite.harmful)
    drawn_from = [
        data_entry("attack", options.safety_data or "", harmful), data_entry("task", options.task_data or "", task),
    ]  # fmt: skip
    shown = {k: v for k, v in vars(options).items() if k not in ("resume", "overwrite", "name")}
    record: RunRecord = {
        "verb": "attack", "method": method, "command": command, "seed": config.seed, "attack": name,
        "targets": targets, "data": [e for e in drawn_from if e["rows"]] + [evaluation],
        "config": {**shown, **config.values()}, "parent": first if is_run(first) else None,
        "overlap_dropped": exclusion.summary(),
    }  # fmt: skip
    key = {"kind": method, "attack": name, "settings": {}, "traits": config.traits, "seed": config.seed}
    key["attack_hash"] = config.setting_hash(method, drawn_from, evaluation)
    with writing(folder, record, options.resume, options.overwrite) as run:
        config.output_dir = str(run.checkpoints)
        if exclusion.dropped:
            run.write_lines(DROPPED, exclusion.dropped)
        rows: list[Row] = []
        generations: list[Generation] = []
        for target in targets:
            done = run.path / f"{target['label']}.done.json"  # complete, so that a killed run continues after it
            if not done.exists():
                keeps = run.path if options.keep_weights and target["role"] == "model" else None
                fresh = exclusion.fresh()
                work = context.AttackContext(target, options, harmful, task, suite, key, keeps, exclusion=fresh)
                config.run(work)
                part = done.with_suffix(".part")
                part.write_text(json.dumps([work.record, work.results, work.generations]), encoding="utf-8")
                part.replace(done)
            info, *lines = json.loads(done.read_text(encoding="utf-8"))
            rows, generations = rows + lines[0], generations + lines[1]
            record["steps"], target["template_hash"] = info.pop("steps"), info.pop("template_hash")
            if target["role"] == "model":
                record.setdefault("model", info)
        run.write_lines(RESULTS, rows)
        run.write_lines(GENERATIONS, generations)
        for done in run.path.glob("*.done.json"):
            done.unlink()
        weights = "model" if getattr(config, "trainable", None) == "full" else "adapter"
        record["adapter"] = weights if options.keep_weights else None
    return run.final
