"""`tunevax attack`: one attack on every model and the control, scored along the way, and a run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunevax.attacks.context import (
    AttackContext,
    TargetOptions,
    attack_data,
    find_targets,
    use_data_of_run,
    use_saved_template,
)
from tunevax.attacks.kind import AttackKind
from tunevax.data.contamination import Exclusion, check
from tunevax.environment import require_one_process
from tunevax.errors import UsageError
from tunevax.mixins import option, require_given
from tunevax.records import DROPPED, GENERATIONS, RESULTS, Generation, Row, Target, data_entry, is_run
from tunevax.runs import writing
from tunevax.scoring.suite import build_suite


@dataclass
class AttackOptions(TargetOptions):
    """What `tunevax attack` takes besides the attacker's own options."""

    name: str | None = option(None, "what the report calls this attack; default the output folder")
    keep_weights: bool = option(False, "keep the attacked weights of --model (default: deleted)")
    resume: bool = option(False, "continue an unfinished run at the model it had reached")


def attack(method: str, options: AttackOptions, config: AttackKind, command: str = "") -> Path:
    """Attack every model and the control identically, scoring along the way, and return the run folder.

    Args:
        method: the kind of attack, for the record.
        config: its options; their `output_dir` becomes the run folder.

    Raises:
        UsageError: bad data, model or options; prompts shared between alignment, attack and evaluation.
    """
    require_given(options, "model")
    require_given(config, "output_dir")
    require_one_process("an attack")
    options = use_data_of_run(options)
    if options.keep_weights and (len(options.model) > 1 or getattr(config, "trainable", None) not in ("lora", "full")):
        raise UsageError("--keep-weights takes one --model, and --trainable lora or full")
    options = dataclasses.replace(options, control=options.control or config.default_control)
    targets = find_targets(options.model, options.control)
    if why := config.applies(targets, options):
        raise UsageError(f"the {method} attack does not apply: {why}")
    used = [config.used(target["ref"]) for target in targets]
    exclusion = Exclusion.of(used, options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    harmful, task = attack_data(options, config.needs, exclusion)
    own = config.kept_rows(options, exclusion)
    options = use_saved_template(options, targets)
    for target, before in zip(targets, used, strict=True):
        found = check(target["ref"], suite.roles(), harmful, {"task": task, **own}, options.allow_overlap, used=before)
        target |= cast(Target, found)

    first = next(t["ref"] for t in targets if t["role"] == "model")
    values = config.values()
    name = options.name or Path(config.output_dir).name
    evaluation = data_entry("evaluation", options.eval_data or options.safety_data or "", suite.harmful)
    drawn_from = [
        data_entry("attack", options.safety_data or "", harmful),
        data_entry("task", options.task_data or "", task),
    ]
    record: dict[str, Any] = {
        "verb": "attack", "method": method, "command": command, "seed": config.seed, "attack": name,
        "targets": targets, "data": [e for e in drawn_from if e["rows"]] + [evaluation],
        "config": {**vars(options), **values}, "parent": first if is_run(first) else None,
        "overlap_dropped": exclusion.summary(),
    }  # fmt: skip
    for name_of_option in ("resume", "overwrite", "name"):
        record["config"].pop(name_of_option)
    setting = config.setting_hash(method, drawn_from, evaluation)
    key = {
        "kind": method, "attack": name, "attack_hash": setting, "settings": {}, "traits": config.traits,
        "seed": config.seed,
    }  # fmt: skip
    with writing(config.output_dir, record, options.resume, options.overwrite) as run:
        config.output_dir = str(run.checkpoints)
        if exclusion.dropped:
            run.write_lines(DROPPED, exclusion.dropped)
        rows: list[Row] = []
        generations: list[Generation] = []
        for target in targets:
            done = run.path / f"{target['label']}.done.json"  # whole, so that a killed run goes on after it
            if not done.exists():
                keeps = run.path if options.keep_weights and target["role"] == "model" else None
                context = AttackContext(target, options, harmful, task, suite, key, keeps, exclusion=exclusion.fresh())
                config.run(context)
                part = done.with_suffix(".part")
                part.write_text(json.dumps([context.record, context.results, context.generations]), encoding="utf-8")
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
        record["adapter"] = ("model" if config.full_weights else "adapter") if options.keep_weights else None
    return run.final
