"""`tunevax attack`: one attack on every model and the control, scored along the way, and a run folder.

A kind of attack is a dataclass of options with a method `run(bench)`: it takes the target, the data and the suite from
the `Bench`, does what the attacker would do, and calls `bench.score` wherever the curve has a point.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunevax.console import console
from tunevax.data.contamination import Exclusion, Rows, check, recorded_prompts, used_prompts
from tunevax.data.safety import load_safety
from tunevax.data.tasks import load_task
from tunevax.errors import UsageError
from tunevax.mixins import ModelsOptions, Overlap, RunOptions, require_given
from tunevax.modeling.loading import Loaded, absolute, load
from tunevax.records import Target
from tunevax.runs import SCHEMA, RunFolder, data_entry, digest, is_run, read_run, require_one_process, writing
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.suite import Suite, SuiteOptions, build_suite, labels_of


@dataclass
class TargetOptions(SuiteOptions, ModelsOptions, Overlap, RunOptions):
    """What every verb that attacks takes: the targets, the data and how to load them."""

    control: str | None = field(
        default=None,
        metadata={
            "help": "the model to compare with, attacked identically; default what --model was hardened from; "
            "none for no control",
            "decides": "cells",
        },
    )
    safety_data: str | None = field(
        default=None,
        metadata={"help": "harmful rows: prompt and rejected, their attack split", "decides": "rows"},
    )
    task_data: str | None = field(
        default=None,
        metadata={"help": "benign rows: prompt and completion, their train split", "decides": "rows"},
    )


Options = TypeVar("Options", bound=TargetOptions)


@dataclass
class AttackOptions(TargetOptions):
    """What `tunevax attack` takes besides the attacker's own options."""

    name: str | None = field(
        default=None, metadata={"help": "what the report calls this attack; default the output folder"}
    )
    keep_weights: bool = field(
        default=False, metadata={"help": "keep the attacked weights of --model (default: deleted)"}
    )
    resume: bool = field(default=False, metadata={"help": "continue an unfinished run at the model it had reached"})


@dataclass
class AttackConfig:
    """The options of an attack that trains no weights."""

    output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
    seed: int = field(default=42, metadata={"help": "of every random choice of the attack"})


OPEN_TO_CUSTOMERS = ("poisoned-job", "prefill", "template")
"""Kinds of attack that take no more than a fine-tuning service gives: its training, and the model's answers."""


def beside_the_job(ref: str, kind: str) -> str | None:
    """Why a kind of attack says nothing of a model, if that was defended while it was fine-tuned: the defence is in the
    provider's training, and an attacker who trains without it has the weights, which such a defence does not give."""
    record = read_run(ref) if is_run(ref) else {}
    if record.get("verb") != "finetune" or kind in OPEN_TO_CUSTOMERS:
        return None
    if record["method"] == "sft" and record["config"].get("screen") != "drop":
        return None
    return (
        f"{record['method']} defends while the provider trains, so it is judged by poisoning the customer's data "
        f"(poisoned-job), never by {kind}, which goes on without it"
    )


class NotApplicable(UsageError):
    """This attack cannot be made on these models; an audit records it and goes on."""


class Bench:
    """What an attack on one model works with.

    Attributes:
        target: label, role and ref of the model.
        options: data sources and how to load.
        harmful: rows of the attack split with `prompt` and `rejected`; empty if the attack uses none.
        task: benign rows with `prompt` and `completion`; empty if the attack uses none.
        suite: what the model is scored on.
        key: fields that every row of results carries: kind, attack, attack_hash, settings, seed.
        folder: where an attack that keeps weights may put them, or None.
        before: scores of untouched models, kept from one attack of an audit to the next; None keeps nothing.
        results, generations: the rows so far.
        record: what run.json says of the model: its info, steps and template.
        exclusion: what is left out of rows that the attack reads itself.
    """

    def __init__(
        self, target: dict[str, Any], options: TargetOptions, harmful: Sequence[dict], task: Sequence[dict],
        suite: Suite, key: dict[str, Any], folder: Path | None = None, before: dict | None = None,
        exclusion: Exclusion | None = None,
    ) -> None:  # fmt: skip
        self.target, self.options, self.harmful, self.task, self.suite = target, options, harmful, task, suite
        self.key, self.folder, self.before = key, folder, before
        self.exclusion = exclusion or Exclusion()
        self.results: list[dict[str, Any]] = []
        self.generations: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {}
        self.loaded = (target["ref"], True)  # which model, and whether its last adapter is merged

    def load(self, chat_template: str | None = None, ref: str | None = None, **how: Any) -> Loaded:
        """The target (or `ref` in its place), loaded as the options say, or as `how` says; what run.json says of it is
        noted."""
        o = self.options
        self.loaded = (ref or self.target["ref"], how.get("merge", True))
        how = {"revision": o.revision, "dtype": o.dtype, "chat_template": chat_template or o.chat_template, **how}
        loaded = load(self.loaded[0], **how)
        self.record.update(loaded.info, template_hash=digest(loaded.tokenizer.chat_template))
        return loaded

    def score(
        self, model: Any, tokenizer: Any, step: int, samples: int = 0, suite: Suite | None = None, full: bool = False
    ) -> None:
        """Add a row to the results, and the responses behind it.

        Args:
            step: optimiser steps of the attack so far, 0 before it.
            samples: rows it trained on so far.
            suite: if not the bench's own.
            full: with what is measured only before an attack, such as perplexity.
        """
        untouched = self.before if step == 0 and suite is None and not full else None
        import torch

        kept = (untouched or {}).get(self.loaded)
        # Scoring must not move the attack's random numbers, or a first attack would differ from a second.
        with torch.random.fork_rng():
            scores, responses = kept or evaluate(model, tokenizer, suite or self.suite, full=full)
        if untouched is not None:
            untouched[self.loaded] = scores, responses
        harmful = max(scores[name]["value"] for name in scores if name.startswith("harmful/"))
        if self.target["role"] == "control" and step == 0 and harmful > 0.5 and self.before is None:
            console.print(
                f"note: the control {self.target['label']} is {harmful:.0%} harmful before the attack, so nothing can "
                "be compared with it; give an aligned one with --control",
                highlight=False,
            )
        row = {"schema": SCHEMA, "model": self.target["label"], "role": self.target["role"], **self.key, "step": step}
        self.results.append({**row, "samples": samples, "train_loss": None, "scores": scores})
        place = {"model": row["model"], **{k: row[k] for k in ("attack", "seed", "step")}}
        self.generations += [{**place, **response} for response in responses]
        self.record["steps"] = max(step, self.record.get("steps", 0))

    def write(self, folder: Path) -> None:
        """Append the rows to results.jsonl and generations.jsonl."""
        for name, lines in (("results.jsonl", self.results), ("generations.jsonl", self.generations)):
            with (folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def attack(method: str, options: AttackOptions, config: Any, command: str = "") -> Path:
    """Attack every model and the control identically, scoring along the way, and return the run folder.

    Args:
        method: the kind of attack, for the record.
        config: its options, with `run(bench)`; its `output_dir` becomes the run folder.

    Raises:
        UsageError: bad data, model or options; prompts shared between alignment, attack and evaluation.
    """
    require_given(options, "model")
    require_given(config, "output_dir")
    require_one_process("an attack")
    options = use_data_of_run(options)
    if options.keep_weights and (len(options.model) > 1 or getattr(config, "trainable", None) not in ("lora", "full")):
        raise UsageError("--keep-weights takes one --model, and --trainable lora or full")
    if method == "poisoned-job" and options.control is None:
        options = dataclasses.replace(options, control="none")  # what the job started from is no job
    targets = find_targets(options.model, options.control)
    for target in targets:
        if why := beside_the_job(target["ref"], method):
            raise UsageError(f"{target['ref']}: {why}")
    used = [trained_on(method, target["ref"]) for target in targets]
    exclusion = Exclusion.of(used, options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, exclusion=exclusion)
    exclusion.settle(suite.roles())
    harmful, task = attack_data(options, config.needs, exclusion)
    own = rows_of_its_own(config, options, exclusion)
    options = use_saved_template(options, targets)
    for target, before in zip(targets, used, strict=True):
        target |= check(
            target["ref"], suite.roles(), harmful, {"task": task, **own}, options.allow_overlap, used=before
        )

    first = next(t["ref"] for t in targets if t["role"] == "model")
    values = values_of(config)
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
    for key in ("resume", "overwrite", "name"):
        record["config"].pop(key)
    setting = setting_hash(method, config, drawn_from, evaluation)
    key = {"kind": method, "attack": name, "attack_hash": setting, "settings": {}, "seed": config.seed}
    with writing(config.output_dir, record, options.resume, options.overwrite) as run:
        config.output_dir = str(run.checkpoints)
        keep_finished(run)
        if exclusion.dropped:
            run.write_lines("dropped.jsonl", exclusion.dropped)
        for target in targets:
            done = run.path / f"{target['label']}.done.json"
            if not done.exists():
                keeps = run.path if options.keep_weights and target["role"] == "model" else None
                bench = Bench(target, options, harmful, task, suite, key, keeps, exclusion=exclusion.fresh())
                config.run(bench)
                bench.write(run.path)
                done.write_text(json.dumps(bench.record), encoding="utf-8")
            info = json.loads(done.read_text(encoding="utf-8"))
            record["steps"], target["template_hash"] = info.pop("steps"), info.pop("template_hash")
            if target["role"] == "model":
                record.setdefault("model", info)
        for target in targets:
            (run.path / f"{target['label']}.done.json").unlink()
        record["adapter"] = ("model" if config.full_weights else "adapter") if options.keep_weights else None
    return run.final


def use_data_of_run(options: Options) -> Options:
    """The options with those that the first model was hardened with where safety or task data were not named."""
    config = read_run(options.model[0])["config"] if is_run(options.model[0]) else {}
    used = {}
    for name in ("safety_data", "task_data"):
        source = config.get(name)
        while name == "safety_data" and source and is_run(source):  # curated rows: the attack needs what they are from
            source = read_run(source)["config"]["safety_data"]
        if getattr(options, name) is None and source:
            used[name] = source
    if used:
        named = " ".join(f"--{name.replace('_', '-')} {source}" for name, source in used.items())
        console.print(f"data as {options.model[0]} was hardened with: {named}", highlight=False)
    return dataclasses.replace(options, **used)


def values_of(config: Any) -> dict[str, Any]:
    """An attack's options as plain values, without what says only where to write."""
    values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k not in ("output_dir", "run_name")}


def setting_hash(method: str, config: Any, drawn_from: Sequence[dict], evaluation: dict[str, Any]) -> str:
    """The same for every seed of one setting: of what the rows are drawn from, not of the draw."""
    data = [entry["hash"] for entry in drawn_from]
    values = {**values_of(config), "seed": None, "data": data, "evaluation": evaluation["hash"]}
    return digest(values if method == "finetune" else {"method": method, **values})


def attack_data(
    options: TargetOptions, needs: Collection[str], exclusion: Exclusion | None = None
) -> tuple[list[dict], list[dict]]:
    """The harmful and the benign rows that an attack draws from; what is not in `needs` is empty.

    Args:
        exclusion: which rows to leave out; default none.

    Raises:
        UsageError: a source is missing, or no row is left.
    """
    leave_out = exclusion or Exclusion()
    harmful: list[dict] = []
    task: list[dict] = []
    if "harmful" in needs:
        if options.safety_data is None:
            raise UsageError("--safety-data is missing: this attack needs harmful rows")
        harmful = load_safety(options.safety_data, "attack", ("rejected",), "an attack")
        harmful = leave_out.attack("attack", harmful)
    if "task" in needs:
        if options.task_data is None:
            raise UsageError("--task-data is missing: this attack needs benign rows")
        task = leave_out.benign("task", load_task(options.task_data, "train").rows)
    return harmful, task


def rows_of_its_own(config: Any, options: TargetOptions, exclusion: Exclusion) -> dict[str, Rows]:
    """Harmless rows that a kind of attack reads itself, by role, without what is left out."""
    read = getattr(config, "own_rows", None)
    return {role: exclusion.benign(role, rows) for role, rows in (read(options) if read else {}).items()}


def trained_on(method: str, ref: str) -> dict[str, list[str]]:
    """Hashes of the prompts that the model was trained on which `method` attacks, by role. A poisoned job begins below
    the recorded one: of the rows of that, only the provider's safety rows are used again."""
    record = read_run(ref) if is_run(ref) else {}
    if method != "poisoned-job" or record.get("verb") != "finetune":
        return used_prompts(ref)
    below = used_prompts(record.get("parent") or record["model"]["ref"])
    safety = {*below.get("alignment", []), *recorded_prompts(Path(ref)).get("alignment", [])}
    return {**below, **({"alignment": sorted(safety)} if safety else {})}


def use_saved_template(options: Options, targets: Sequence[Target]) -> Options:
    """The options that ask every target by the template of the first hardened model, also a control without one."""
    first = next(t["ref"] for t in targets if t["role"] == "model")
    saved = [p for p in (Path(first, d, "chat_template.jinja") for d in ("adapter", "model", "")) if p.is_file()]
    if options.chat_template is None and saved:
        return dataclasses.replace(options, chat_template=str(saved[0]))
    return options


def find_targets(models: Sequence[str], control: str | None) -> list[Target]:
    """The models to attack and the control, with a label each, the control first.

    Args:
        control: a model, `none`, or None for what the first model was hardened from.
    """
    if control is None and is_run(models[0]):
        record = read_run(models[0])
        control = record.get("parent") or record.get("model", {}).get("ref")
    refs = [(control, "control")] if control and control != "none" else []
    refs += [(ref, "model") for ref in models if not control or absolute(ref) != absolute(control)]
    if not any(role == "model" for _, role in refs):
        raise UsageError("the control is the model itself; give another --control, or none")
    labels = labels_of([ref for ref, _ in refs])
    return [{"label": n, "role": role, "ref": absolute(ref)} for n, (ref, role) in zip(labels, refs, strict=True)]


def keep_finished(run: RunFolder) -> None:
    """Drop what a killed run wrote of a model it had not finished; its last line may have been cut in the middle."""
    finished = {path.name.removesuffix(".done.json") for path in run.path.glob("*.done.json")}
    for name in ("results.jsonl", "generations.jsonl"):
        if (run.path / name).exists():
            kept = []
            for line in (run.path / name).read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError):
                    kept.append(json.loads(line))
            run.write_lines(name, [row for row in kept if row["model"] in finished])
