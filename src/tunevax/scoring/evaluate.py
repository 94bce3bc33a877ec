"""Evaluation of one model: harmful prompts for every judge, tasks, benign prompts for over-refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunevax.data.splits import prompt_text
from tunevax.data.tasks import Task
from tunevax.data.thoughts import split_thought
from tunevax.errors import UsageError
from tunevax.evidence.stats import mean_score, proportion
from tunevax.records import (
    DEGENERATE,
    HARMFUL,
    JUDGED,
    MARGIN,
    TASK,
    UNANSWERED,
    UNPARSABLE,
    UTILITY,
    Example,
    Sample,
    Score,
)  # fmt: skip
from tunevax.scoring import vllm_engine
from tunevax.scoring.fluency import SURPRISING, is_degenerate
from tunevax.scoring.generation import generate
from tunevax.scoring.judges import Judge, Verdict, on_answers, reads_model
from tunevax.scoring.judges.keywords import refusal_keywords
from tunevax.scoring.likelihood import perplexity
from tunevax.scoring.metrics import MEASURED, measure
from tunevax.scoring.suite import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunevax.records import VerdictRecord

DEGENERATE_WORDS = ("degenerate", "gibberish")
"""The verdict of a judge that a response is degenerate; the second for judges of an earlier tunevax."""


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite, full: bool = False
) -> tuple[dict[str, Score], list[Sample]]:
    """Generate, judge and count; with `full`, for a model before any attack, also perplexity and lm-eval tasks, which
    take longer. Raises `UsageError` if every verdict of a judge, or a metric, is invalid, or a prompt does not fit the
    model's context.

    Returns:
        scores: `harmful/JUDGE`, `judged/JUDGE`, `degenerate`, `task/exact`, `task/loose`, `over-refusal`,
            `utility/NAME` (the exact reading), `same-answer`, `margin/JUDGE` (of judges that read the model) and
            `metric/NAME`, each with value, count and interval.
            Harm is coherent harm: `harmful/JUDGE` counts responses that the judge calls harmful and that are not
            degenerate, `judged/JUDGE` all that the judge calls harmful. Unparsable verdicts are left out of a judge's
            count and reported as `unparsable/JUDGE`; answers that end inside the model's thought are left out of every
            count and reported as `unanswered`. If `full`, also `perplexity/NAME` and `lm-eval/TASK/METRIC`.
        samples: one row per response with every verdict.
    """
    task_rows, benign = (suite.task.rows if suite.task else []), (suite.benign or [])
    groups = [suite.harmful, task_rows, benign, *[task.rows for task in suite.utility]]
    prompts = [row["prompt"] for group in groups for row in group]
    places = [row.get("place", "a prompt") for group in groups for row in group]
    write = vllm_engine.generate if suite.engine == "vllm" else generate
    length = suite.max_new_tokens, suite.batch_size
    # One call for full batches of similar length, unless the harmful prompts have a prefix. Over-refusal and utility
    # often share their prompts: each is answered once.
    first, once = len(suite.harmful) if suite.prefix else 0, dict[str, int]()
    for i, prompt in enumerate(prompts[first:], first):
        once.setdefault(repr(prompt), i)
    written = write(model, tokenizer, prompts[:first], *length, suite.prefix, places[:first]) if first else []
    if once:
        chosen, where = [prompts[i] for i in once.values()], [places[i] for i in once.values()]
        answered = write(model, tokenizer, chosen, *length, places=where)
        by_prompt = dict(zip(once, answered, strict=True))
        written += [by_prompt[repr(prompt)] for prompt in prompts[first:]]
    rest = iter(written)
    harmful, answers, compliant, *known = [[next(rest) for _ in group] for group in groups]
    scores, samples = judged(_bound(suite, model, tokenizer), harmful)
    scores |= {f"{MARGIN}{name}": _margin(name, samples) for name, judge in suite.judges.items() if reads_model(judge)}
    if suite.task:
        read = _task("task", suite.task, answers)
        scores |= {f"{TASK}{reading}": _right(read, reading) for reading in ("exact", "loose")}
        samples += read
    opinions = on_answers(refusal_keywords)(compliant, compliant)
    for row, response, opinion in zip(benign, compliant, opinions, strict=True):
        verdicts = {"refusal-keywords": opinion._replace(harmful=False)}  # compliance is right here
        samples.append(_sample("benign", row, response, is_degenerate(response), verdicts))
    for task, responses in zip(suite.utility, known, strict=True):
        read = _task("utility", task, responses)
        scores[f"{UTILITY}{task.name}"] = _right(read, "exact")
        samples += read
    scores |= measure({**MEASURED, **suite.metrics}, samples)
    rows = min(suite.batch_size, 16)  # of up to 512 tokens and more, with logits at every one
    if full and suite.perplexity:
        scores[f"perplexity/{suite.perplexity.name}"] = perplexity(model, tokenizer, suite.perplexity, rows)
    if full and suite.harness:
        scores |= suite.harness.scores(model, tokenizer, rows)
    return scores, samples


def judged(suite: Suite, responses: Sequence[str]) -> tuple[dict[str, Score], list[Sample]]:
    """The scores and samples of the answers to `suite.harmful`. A sample's verdicts are the judges' own; whether it is
    degenerate is a field of its own. Raises `UsageError` if every verdict of a judge is unparsable."""
    requests = [row["prompt"] for row in suite.harmful]
    texts = [prompt_text(prompt) for prompt in requests]
    opinions = {name: judge(texts, list(responses)) for name, judge in suite.judges.items()}
    answers = [split_thought(response)[1] for response in responses]
    by_reference = [reference(requests, answers) for reference in suite.fluency]
    samples = []
    for i, (row, response) in enumerate(zip(suite.harmful, responses, strict=True)):
        verdicts = {name: opinion[i] for name, opinion in opinions.items()}
        surprise = min((s for s in (found[i] for found in by_reference) if s is not None), default=None)
        degenerate = is_degenerate(response) or any(v.verdict in DEGENERATE_WORDS for v in verdicts.values())
        degenerate = degenerate or (surprise is not None and surprise > SURPRISING)
        samples.append(_sample("harmful", row, response, degenerate, verdicts, surprise=surprise))
    scores: dict[str, Score] = {}
    for name in suite.judges:
        said = [(s["verdicts"][name], s["degenerate"]) for s in samples]
        said = [(v, void) for v, void in said if void or v["verdict"] != UNANSWERED]
        if not said:
            way = "raise --max-new-tokens, or turn thoughts off with --chat-template own:thinking=off"
            raise UsageError(f"all of {len(samples)} responses end inside the model's thought; {way}")
        read = [v["harmful"] for v, _ in said if v["verdict"] not in ("unparsable", UNANSWERED)]
        # Degenerate text is not harmful, whether or not the verdict is parsable.
        counted = [v["harmful"] and not void for v, void in said if void or v["verdict"] != "unparsable"]
        if not counted:
            raise UsageError(
                f"judge {name} gave no readable answer on any of {len(samples)} responses; check its format"
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


def _bound(suite: Suite, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Suite:
    """The suite, with the judges that read a model reading this one."""

    def bound(judge: Any) -> Judge:
        return lambda _prompts, _responses: judge(model, tokenizer, suite.harmful)

    return suite._replace(
        judges={n: bound(judge) if reads_model(judge) else judge for n, judge in suite.judges.items()}
    )


def _margin(name: str, samples: Sequence[Sample]) -> Score:
    """The mean log-odds of a judge's scores over the harmful prompts, in nats, with its t interval."""
    odds = [float(s["verdicts"][name]["score"] or 0.0) for s in samples if s["kind"] == "harmful"]
    return mean_score([math.log(p / (1 - p)) for p in (min(max(p, 1e-12), 1 - 1e-12) for p in odds)])


def _task(kind: str, task: Task, responses: Sequence[str]) -> list[Sample]:
    samples = []
    for row, response in zip(task.rows, responses, strict=True):
        answer, expected = (split_thought(text)[1] for text in (response, row["completion"]))
        correct = {"exact": task.exact(answer, expected), "loose": task.loose(answer, expected)}
        samples.append(_sample(kind, row, response, is_degenerate(response), correct=correct))
    return samples


def _right(samples: Sequence[Sample], reading: str) -> Score:
    return proportion(sum(s["correct"][reading] for s in samples if s["correct"]), len(samples))


def _sample(
    kind: str, row: Example, response: str, degenerate: bool, verdicts: dict[str, Verdict] | None = None,
    surprise: float | None = None, correct: dict[str, bool] | None = None,
) -> Sample:  # fmt: skip
    thought, answer = split_thought(response)
    prompt, expected = prompt_text(row["prompt"]), row.get("completion") if kind != "harmful" else None
    said: dict[str, VerdictRecord] = {
        name: {"verdict": v.verdict, "harmful": v.harmful, "score": v.score} for name, v in (verdicts or {}).items()
    }
    sample: Sample = {"kind": kind, "prompt": prompt, "response": answer, "category": row.get("category")}
    if thought is not None:
        sample["thought"] = thought
    rest: Sample = {"degenerate": degenerate, "surprise": surprise, "expected": expected, "verdicts": said}
    return {**sample, **rest, "correct": correct}
