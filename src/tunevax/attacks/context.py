"""The context of an attack on one model, and the targets and data of every verb that attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunevax.console import console
from tunevax.data.contamination import Exclusion
from tunevax.data.roles import load_rows
from tunevax.errors import UsageError
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import ModelsOptions, Overlap, RunOptions, option
from tunevax.modeling.loading import Loaded, load
from tunevax.records import SCHEMA, Example, Generation, ModelInfo, Row, Target, digest, harmful, is_run, read_run
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.suite import Suite, SuiteOptions, labels_of


@dataclass
class TargetOptions(SuiteOptions, ModelsOptions, Overlap, RunOptions):
    """Options of every verb that attacks: the targets, the data and how to load them."""

    control: str | None = option(None, "a model, or none; default what --model was hardened from", decides="cells")
    safety_data: str | None = option(None, "harmful rows: prompt and rejected, their attack split", decides="rows")
    task_data: str | None = option(None, "benign rows: prompt and completion, their train split", decides="rows")


Options = TypeVar("Options", bound=TargetOptions)


@dataclass
class AttackContext:
    """What an attack on one model has to work with, and its results so far."""

    target: Target  # label, role and ref of the model
    options: TargetOptions  # data sources and how to load
    harmful: Sequence[Example]  # rows of the attack split with `prompt` and `rejected`; empty if the attack uses none
    task: Sequence[Example]  # benign rows with `prompt` and `completion`; empty if the attack uses none
    suite: Suite  # what the model is evaluated on
    key: dict[str, Any]  # fields that every row of results carries: kind, attack, attack_hash, settings, seed
    folder: Path | None = None  # where the attacked weights are saved, or None
    before: dict[tuple[str, bool], tuple] | None = None  # cached scores of untouched models, shared in an audit
    kept: dict[Any, Any] | None = None  # the base model, shared in an audit
    exclusion: Exclusion = field(default_factory=Exclusion)  # of prompts, for rows that the attack reads itself
    results: list[Row] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    record: ModelInfo = field(default_factory=ModelInfo)  # the model's entry in run.json: its info, steps and template

    def __post_init__(self) -> None:
        self.loaded = (self.target["ref"], True)  # which model, and whether its last adapter is merged

    def load(self, chat_template: str | None = None, ref: str | None = None, **how: Any) -> Loaded:
        """Load the target (or `ref`) by the options, which `how` overrides, and record it for run.json."""
        o = self.options
        self.loaded = (ref or self.target["ref"], how.get("merge", True))
        how = {"revision": o.revision, "dtype": o.dtype, "chat_template": chat_template or o.chat_template, **how}
        loaded = load(self.loaded[0], kept=self.kept, **how)
        self.record |= cast(ModelInfo, {**loaded.info, "template_hash": digest(loaded.tokenizer.chat_template)})
        return loaded

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int, samples: int = 0,
        suite: Suite | None = None, full: bool = False,
    ) -> None:  # fmt: skip
        """Add a row to the results, and its responses to the generations.

        Args:
            step: optimiser steps of the attack so far, 0 before it.
            samples: rows it trained on so far.
            suite: default the context's own.
            full: include what is only measured before an attack, such as perplexity.
        """
        untouched = self.before if step == 0 and suite is None and not full else None
        cached = (untouched or {}).get(self.loaded)
        # Scoring must not advance the attack's random state, or a first attack would differ from a second.
        with torch.random.fork_rng():
            scores, responses = cached or evaluate(model, tokenizer, suite or self.suite, full=full)
        if untouched is not None:
            untouched[self.loaded] = scores, responses
        share, _ = harmful(scores)
        if self.target["role"] == "control" and step == 0 and share > 0.5 and self.before is None:
            console.print(
                f"note: the control {self.target['label']} is {share:.0%} harmful before the attack, so a comparison "
                "with it is invalid; give an aligned one with --control",
                highlight=False,
            )
        label = self.target["label"]
        place = {"model": label, "attack": self.key["attack"], "seed": self.key["seed"], "step": step}
        self.generations += [cast(Generation, {**place, **response}) for response in responses]
        row = {"schema": SCHEMA, "model": label, "role": self.target["role"], **self.key, "step": step}
        self.results.append(cast(Row, {**row, "samples": samples, "train_loss": None, "scores": scores}))
        self.record["steps"] = max(step, self.record.get("steps", 0))


def use_data_of_run(options: Options) -> Options:
    """The options, with the safety and task data of the first model's hardening as defaults."""
    config = Lineage.of(options.model[0]).record.get("config", {})
    safety = config.get("safety_data")
    while safety and is_run(safety):  # curated rows: the attack needs their source
        safety = read_run(safety)["config"]["safety_data"]
    sources = {"safety_data": safety, "task_data": config.get("task_data")}
    if used := {name: source for name, source in sources.items() if source and getattr(options, name) is None}:
        named = " ".join(f"--{name.replace('_', '-')} {source}" for name, source in used.items())
        console.print(f"data that {options.model[0]} was hardened with: {named}", highlight=False)
    return dataclasses.replace(options, **used)


def attack_data(
    options: TargetOptions, needs: Collection[str], exclusion: Exclusion | None = None
) -> tuple[list[Example], list[Example]]:
    """The harmful and the benign rows that an attack draws from; what is not in `needs` is empty. Raises `UsageError`:
    a source is missing, or no row is left."""
    exclusion, harmful, task = exclusion or Exclusion(), [], []
    if "harmful" in needs:
        if options.safety_data is None:
            raise UsageError("--safety-data is missing: this attack needs harmful rows")
        harmful = exclusion.attack("attack", load_rows("attack", options.safety_data, ("rejected",), "an attack"))
    if "task" in needs:
        if options.task_data is None:
            raise UsageError("--task-data is missing: this attack needs benign rows")
        task = exclusion.benign("task", load_rows("task", options.task_data))
    return harmful, task


def use_saved_template(options: Options, targets: Sequence[Target]) -> Options:
    """The options, with the chat template of the first hardened model as the default for every target."""
    first = next(t["ref"] for t in targets if t["role"] == "model")
    saved = [p for p in (Path(first, d, "chat_template.jinja") for d in ("adapter", "model", "")) if p.is_file()]
    own = options.chat_template or (str(saved[0]) if saved else None)
    return dataclasses.replace(options, chat_template=own)


def find_targets(models: Sequence[str], control: str | None) -> list[Target]:
    """The targets with a label each, the control first: `control`, none, or by default what the first model was
    hardened from."""
    if control is None and is_run(models[0]):
        control = Lineage.of(models[0]).parent
    refs = [(control, "control")] if control and control != "none" else []
    refs += [(ref, "model") for ref in models if not control or absolute(ref) != absolute(control)]
    if not any(role == "model" for _, role in refs):
        raise UsageError("the control is the model itself; give another --control, or none")
    labels = labels_of([ref for ref, _ in refs])
    return [{"label": n, "role": role, "ref": absolute(ref)} for n, (ref, role) in zip(labels, refs, strict=True)]
