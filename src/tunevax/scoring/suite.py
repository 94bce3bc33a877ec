"""The evaluation suite: harmful prompts and their judges, tasks, benign prompts, a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tunevax.data.contamination import Exclusion
from tunevax.data.roles import load_rows
from tunevax.data.splits import drawn
from tunevax.data.tasks import Task, load_task
from tunevax.errors import UsageError, require, require_one_of
from tunevax.mixins import option
from tunevax.records import Example
from tunevax.scoring import vllm_engine
from tunevax.scoring.fluency import Reference, Surprise
from tunevax.scoring.judges import Judge, load_judges, reads_model
from tunevax.scoring.likelihood import Text, load_text
from tunevax.scoring.lm_eval import Harness, load_harness
from tunevax.scoring.metrics import Metric, load_metrics

ENGINES = ("transformers", "vllm")


@dataclass
class SuiteOptions:
    """Options of the evaluation suite, shared by `score` and the attacks."""

    eval_data: str | None = option(
        None, "harmful prompts to score on; default the evaluation split of --safety-data", decides="rows"
    )
    judges: list[str] = option(
        ["refusal-keywords"], "refusal-keywords, forced-choice, proxy, organism, hf:MODEL; side by side"
    )
    task_eval_data: str | None = option(
        None, "task to measure accuracy on; default the evaluation split of --task-data", decides="rows"
    )
    benign_data: str | None = option(None, "harmless prompts, to count refusals of", decides="rows")
    utility_data: list[str] = option(
        [], "tasks the model can do before any attack: task sources, or lm-eval:TASK[:path=FOLDER]"
    )
    perplexity_data: str | None = option(None, "a text file to measure perplexity on, or organism")
    fluency_model: list[str] = option(
        [], "reference language models; a response that surprises each of them counts as degenerate; default none"
    )
    limit: int = option(500, "at most so many prompts of each kind, drawn by their hash")
    max_new_tokens: int = option(128, "length of a generated answer")
    generation_batch_size: int = option(128, "answers generated together, fewer where prompts are long", decides="rows")
    metrics: list[str] = option([], "further metrics over the answers, from installed packages")
    engine: str = option("transformers", "generation engine: transformers, or vllm (tunevax score only)")

    def __post_init__(self) -> None:
        require(self, "limit", "max_new_tokens", "generation_batch_size", at_least=1)
        require_one_of(self, engine=ENGINES)


class Suite(NamedTuple):
    """The data, judges and metrics that a model is evaluated with."""

    harmful: Sequence[Example]  # prompts that a safe model refuses
    judges: dict[str, Judge]  # by name, at least one; reported side by side and never averaged
    task: Task | None = None  # a benign task to measure accuracy on
    benign: Sequence[Example] | None = None  # harmless prompts, to count refusals of
    max_new_tokens: int = 128
    batch_size: int = 128  # of the generation
    utility: tuple[Task, ...] = ()  # tasks the model can do before any attack, of distinct names
    perplexity: Text | None = None  # measured with `full` only, as `harness`
    fluency: Sequence[Surprise] = ()  # a response to a harmful prompt that surprises each reference is degenerate
    harness: Harness | None = None  # lm-eval tasks
    prefix: str | Sequence[str] = ""  # prefilled and judged first words of the answers to harmful prompts, one or each
    engine: str = "transformers"  # see `ENGINES`
    metrics: dict[str, Metric] = {}  # by the name of their score, besides those of every evaluation

    def roles(self) -> dict[str, Sequence[Example]]:
        """Every row of the suite, by its role in the data."""
        parts = {"evaluation": self.harmful, "task evaluation": self.task and self.task.rows}
        parts |= {"over-refusal": self.benign, **{f"utility {task.name}": task.rows for task in self.utility}}
        return {role: rows for role, rows in parts.items() if rows}


def build_suite(
    options: SuiteOptions, safety_data: str | None = None, task_data: str | None = None, *, weights_change: bool = True,
    exclusion: Exclusion | None = None, choosing: bool = False,
) -> Suite:  # fmt: skip
    """Load the suite of the options. Raises `UsageError` for no prompts, anything that cannot be loaded, or an engine
    that cannot be used here.

    Args:
        weights_change: the suite is for a model whose weights change in memory between two evaluations.
        exclusion: rows to leave out; default none.
        choosing: the suite chooses an option before any evaluation: it takes the train split of tasks, the alignment
            split of the safety data, and the organism's validation rows.
    """
    in_harness = [source for source in options.utility_data if source.startswith("lm-eval:")]
    if options.engine == "vllm":
        if weights_change:
            why = "it reads a model once, from a folder, and here the weights change in memory between two evaluations"
            raise UsageError(f"--engine vllm is for `tunevax score`: {why}; leave it out")
        if options.perplexity_data or in_harness:
            raise UsageError("--engine vllm only generates; score --perplexity-data and lm-eval tasks without it")
        vllm_engine.require_vllm()
    harmful = options.eval_data or safety_data
    if harmful is None:
        raise UsageError("nothing to score on; give --eval-data, or --safety-data to take its evaluation split")
    leave_out = exclusion or Exclusion()
    judges, metrics = load_judges(options.judges), load_metrics(options.metrics)
    role = "given evaluation" if options.eval_data else "choice" if choosing else "evaluation"
    needs = {name: judge.needs for name, judge in judges.items() if reads_model(judge)}  # type: ignore[attr-defined]
    if needs and options.engine == "vllm":
        raise UsageError(
            f"the judge {next(iter(needs))} reads the model, which --engine vllm keeps to itself; leave it out"
        )
    fields, purpose = sorted({f for needed in needs.values() for f in needed}), f"the judge {', '.join(needs)}"
    rows = leave_out.score("evaluation", load_rows(role, harmful, fields, purpose))
    benign = None
    if options.benign_data:
        harmless = load_rows("choice over-refusal" if choosing else "over-refusal", options.benign_data)
        benign = drawn(leave_out.score("over-refusal", harmless), options.limit)

    def load(source: str, role: str) -> Task:
        task = load_task(source, "train" if choosing else "evaluation")
        return task._replace(rows=drawn(leave_out.score(role, task.rows), options.limit))

    known = [load(source, "utility") for source in options.utility_data if source not in in_harness]
    names = labels_of([task.name for task in known])
    utility = tuple(task._replace(name=name) for task, name in zip(known, names, strict=True))
    task = options.task_eval_data or task_data
    text = load_text(options.perplexity_data)._replace(limit=options.limit) if options.perplexity_data else None
    return Suite(
        drawn(rows, options.limit), judges, load(task, "task evaluation") if task else None, benign,
        options.max_new_tokens, options.generation_batch_size, utility, text,
        fluency=[Reference(ref) for ref in options.fluency_model],
        harness=load_harness(in_harness, options.limit) if in_harness else None, engine=options.engine, metrics=metrics,
    )  # fmt: skip


def labels_of(refs: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its folder or hub id, made distinct by primes."""
    labels: list[str] = []
    for label in (Path(ref).name or ref for ref in refs):
        while label in labels:
            label += "'"
        labels.append(label)
    return labels
