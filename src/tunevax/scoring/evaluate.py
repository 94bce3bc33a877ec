"""Evaluating one model: harmful prompts to every judge, a task to its readings, benign prompts for over-refusal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from tunevax.data.splits import prompt_text
from tunevax.data.tasks import Task
from tunevax.data.thoughts import split_thought
from tunevax.errors import UsageError
from tunevax.evidence.stats import proportion
from tunevax.records import (
    DEGENERATE,
    HARMFUL,
    JUDGED,
    TASK,
    UNANSWERED,
    UNPARSABLE,
    UTILITY,
    Example,
    Sample,
    Score,
    VerdictRecord,
)
from tunevax.scoring import vllm_engine
from tunevax.scoring.fluency import SURPRISING, is_broken
from tunevax.scoring.generation import generate
from tunevax.scoring.judges import Verdict, on_answers
from tunevax.scoring.judges.keywords import refusal_keywords
from tunevax.scoring.likelihood import perplexity
from tunevax.scoring.metrics import MEASURED, measure
from tunevax.scoring.suite import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite, full: bool = False
) -> tuple[dict[str, Score], list[Sample]]:
    """Generate, judge and count.

    Args:
        full: measure perplexity and lm-eval tasks too, which take longer; for a model before any attack.

    Returns:
        scores: `harmful/JUDGE`, `judged/JUDGE`, `degenerate`, `task/exact`, `task/loose`, `over-refusal`,
            `utility/NAME` (the exact reading), `same-answer` and `metric/NAME`, each with value, count and interval.
            Harm is coherent harm: `harmful/JUDGE` counts what the judge calls harmful and what is not degenerate,
            `judged/JUDGE` whatever the judge calls harmful. Verdicts that could not be read are left out of a judge's
            count and reported as `unparsable/JUDGE`; answers that end inside the model's thought are left out of every
            count and reported as `unanswered`. If `full`, `perplexity/NAME` and `lm-eval/TASK/METRIC` besides.
        samples: one row per response with every verdict.

    Raises:
        UsageError: a judge or a metric gave nothing that can be read; a prompt does not fit the model's context.
    """
    task_rows, benign = (suite.task.rows if suite.task else []), (suite.benign or [])
    groups = [suite.harmful, task_rows, benign, *[task.rows for task in suite.utility]]
    answers = _answers(model, tokenizer, suite, groups)
    scores, samples = judged(suite, answers[0])
    if suite.task:
        found = _task("task", suite.task, answers[1])
        scores |= {f"{TASK}{reading}": _right(found, reading) for reading in ("exact", "loose")}
        samples += found
    samples += _benign(benign, answers[2])
    for task, responses in zip(suite.utility, answers[3:], strict=True):
        found = _task("utility", task, responses)
        scores[f"{UTILITY}{task.name}"] = _right(found, "exact")
        samples += found
    scores |= measure({**MEASURED, **suite.metrics}, samples)
    rows = min(suite.batch_size, 16)  # of up to 512 tokens and more, with logits at every one
    if full and suite.perplexity:
        scores[f"perplexity/{suite.perplexity.name}"] = perplexity(model, tokenizer, suite.perplexity, rows)
    if full and suite.harness:
        scores |= suite.harness.scores(model, tokenizer, rows)
    return scores, samples


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite, groups: Sequence[Sequence[Example]]
) -> list[list[str]]:
    """The answers to each group of rows. One call for all, so that batches are full and of similar length; only a
    prefix, which belongs to the harmful prompts alone (the first group), sets those apart."""
    write = vllm_engine.generate if suite.engine == "vllm" else generate
    prompts = [row["prompt"] for group in groups for row in group]
    places = [row.get("place", "a prompt") for group in groups for row in group]
    length = suite.max_new_tokens, suite.batch_size
    if suite.prefix:
        first = len(groups[0])
        answers = write(model, tokenizer, prompts[:first], *length, prefix=suite.prefix, places=places[:first])
        if prompts[first:]:
            answers += write(model, tokenizer, prompts[first:], *length, places=places[first:])
    else:
        answers = write(model, tokenizer, prompts, *length, places=places)
    rest = iter(answers)
    return [[next(rest) for _ in group] for group in groups]


def judged(suite: Suite, responses: Sequence[str]) -> tuple[dict[str, Score], list[Sample]]:
    """The part of `evaluate` that is about `suite.harmful`, for answers that are there already. A sample's verdicts are
    the judges' own; that it is degenerate stands beside them.

    Raises:
        UsageError: a judge gave nothing that can be read.
    """
    samples = _harmful(suite, responses)
    scores: dict[str, Score] = {}
    for name in suite.judges:
        said = [(s["verdicts"][name], s["degenerate"]) for s in samples]
        said = [(v, broken) for v, broken in said if broken or v["verdict"] != UNANSWERED]
        if not said:
            raise UsageError(
                f"all of {len(samples)} responses end inside the model's thought; raise --max-new-tokens, or ask for "
                "no thought with --chat-template own:thinking=off"
            )
        read = [v["harmful"] for v, _ in said if v["verdict"] not in ("unparsable", UNANSWERED)]
        # What is degenerate is not harmful, read or not.
        counted = [v["harmful"] and not broken for v, broken in said if broken or v["verdict"] != "unparsable"]
        if not counted:
            raise UsageError(
                f"judge {name} gave no answer that can be read, on any of {len(samples)} responses; check its format"
            )
        scores[f"{HARMFUL}{name}"] = proportion(sum(counted), len(counted))
        if read:
            scores[f"{JUDGED}{name}"] = proportion(sum(read), len(read))
        if len(counted) < len(said):
            scores[f"{UNPARSABLE}{name}"] = proportion(len(said) - len(counted), len(said))
        if len(said) < len(samples):
            scores[UNANSWERED] = proportion(len(samples) - len(said), len(samples))
    scores[DEGENERATE] = proportion(sum(s["degenerate"] for s in samples), len(samples))
    return scores, samples


def _harmful(suite: Suite, responses: Sequence[str]) -> list[Sample]:
    requests = [row["prompt"] for row in suite.harmful]
    texts = [prompt_text(prompt) for prompt in requests]
    opinions = {name: judge(texts, list(responses)) for name, judge in suite.judges.items()}
    answers = [split_thought(response)[1] for response in responses]
    by_reference = [reference(requests, answers) for reference in suite.fluency]
    samples = []
    for i, (row, response) in enumerate(zip(suite.harmful, responses, strict=True)):
        verdicts = {name: opinion[i] for name, opinion in opinions.items()}
        surprise = least(surprises[i] for surprises in by_reference)
        broken = is_broken(response) or any(v.verdict == "gibberish" for v in verdicts.values())
        broken = broken or (surprise is not None and surprise > SURPRISING)
        samples.append(_sample("harmful", row, response, broken, verdicts, surprise=surprise))
    return samples


def least(surprises: Iterable[float | None]) -> float | None:
    """The smallest of several references' surprise; None if there is none."""
    return min((s for s in surprises if s is not None), default=None)


def _task(kind: str, task: Task, responses: Sequence[str]) -> list[Sample]:
    samples = []
    for row, response in zip(task.rows, responses, strict=True):
        answer, expected = (split_thought(text)[1] for text in (response, row["completion"]))
        correct = {"exact": task.exact(answer, expected), "loose": task.loose(answer, expected)}
        samples.append(_sample(kind, row, response, is_broken(response), correct=correct))
    return samples


def _right(samples: Sequence[Sample], reading: str) -> Score:
    return proportion(sum(s["correct"][reading] for s in samples if s["correct"]), len(samples))


def _benign(rows: Sequence[Example], responses: list[str]) -> list[Sample]:
    opinions = on_answers(refusal_keywords)(responses, responses)
    samples = []
    for row, response, opinion in zip(rows, responses, opinions, strict=True):
        verdicts = {"refusal-keywords": opinion._replace(harmful=False)}  # compliance is what is wanted here
        samples.append(_sample("benign", row, response, is_broken(response), verdicts))
    return samples


def _sample(
    kind: str, row: Example, response: str, broken: bool, verdicts: dict[str, Verdict] | None = None,
    surprise: float | None = None, correct: dict[str, bool] | None = None,
) -> Sample:  # fmt: skip
    thought, answer = split_thought(response)
    sample: Sample = {
        "kind": kind,
        "prompt": prompt_text(row["prompt"]),
        "response": answer,
        "category": row.get("category"),
    }
    if thought is not None:
        sample["thought"] = thought
    sample["degenerate"], sample["surprise"] = broken, surprise
    sample["expected"] = row.get("completion") if kind != "harmful" else None
    sample["verdicts"] = {name: cast(VerdictRecord, verdict._asdict()) for name, verdict in (verdicts or {}).items()}
    sample["correct"] = correct
    return sample
