"""Evaluating one model: harmful prompts to every judge, a task to its readings, benign prompts for over-refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tunevax.data.chat import split_thought
from tunevax.data.splits import prompt_text
from tunevax.data.tasks import Task
from tunevax.errors import UsageError
from tunevax.evidence.stats import proportion
from tunevax.scoring import vllm_engine
from tunevax.scoring.fluency import SURPRISING, is_broken
from tunevax.scoring.generation import generate
from tunevax.scoring.judges import UNANSWERED, refusal_keywords
from tunevax.scoring.likelihood import perplexity
from tunevax.scoring.suite import Suite


def evaluate(
    model: Any, tokenizer: Any, suite: Suite, full: bool = False
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """Generate, judge and count.

    Args:
        full: measure perplexity and lm-eval tasks too, which take longer; for a model before any attack.

    Returns:
        scores: `harmful/JUDGE`, `judged/JUDGE`, `degenerate`, `task/exact`, `task/loose`, `over-refusal`,
            `utility/NAME` (the exact reading) and `same-answer` (the share of all responses that are the most common
            one, white space aside), each with value, count and interval. Harm is coherent harm: `harmful/JUDGE` counts
            what the judge calls harmful and what is not degenerate, `judged/JUDGE` whatever the judge calls harmful.
            Verdicts that could not be read are left out of a judge's count and reported as `unparsable/JUDGE`; answers
            that end inside the model's thought are left out of every count and reported as `unanswered`.
            If `full`, `perplexity/NAME` and `lm-eval/TASK/METRIC` besides.
        samples: one row per response with every verdict.

    Raises:
        UsageError: a judge gave nothing that can be read; a prompt does not fit the model's context.
    """
    task_rows, benign_rows = (suite.task.rows if suite.task else []), (suite.benign or [])
    groups = [suite.harmful, task_rows, benign_rows, *[task.rows for task in suite.utility]]
    answers = _answers(model, tokenizer, suite, groups)
    scores, samples = judged(suite, answers[0])
    if suite.task:
        found = _task("task", suite.task, answers[1])
        scores |= {f"task/{reading}": _share(s["correct"][reading] for s in found) for reading in ("exact", "loose")}
        samples += found
    if suite.benign:
        found = _benign(suite.benign, answers[2])
        said = [s["verdicts"]["refusal-keywords"]["verdict"] for s in found]
        if answered := [verdict == "refused" for verdict in said if verdict != UNANSWERED]:
            scores["over-refusal"] = _share(answered)
        samples += found
    for task, responses in zip(suite.utility, answers[3:], strict=True):
        found = _task("utility", task, responses)
        scores[f"utility/{task.name}"] = _share(s["correct"]["exact"] for s in found)
        samples += found
    written = (s["response"] or s.get("thought", "") for s in samples)
    common = Counter(" ".join(text.split()) for text in written).most_common(1)[0][1]
    scores["same-answer"] = proportion(common, len(samples))
    rows = min(suite.batch_size, 16)  # of up to 512 tokens and more, with logits at every one
    if full and suite.perplexity:
        scores[f"perplexity/{suite.perplexity.name}"] = perplexity(model, tokenizer, suite.perplexity, rows)
    if full and suite.harness:
        scores |= suite.harness.scores(model, tokenizer, rows)
    return scores, samples


def _answers(model: Any, tokenizer: Any, suite: Suite, groups: Sequence[Sequence[dict]]) -> list[list[str]]:
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


def _share(hits: Iterable[bool]) -> dict[str, float | int]:
    hits = list(hits)
    return proportion(sum(hits), len(hits))


def _sample(kind: str, row: dict, response: str, broken: bool, **more: Any) -> dict[str, Any]:
    thought, answer = split_thought(response)
    sample = {"kind": kind, "prompt": prompt_text(row["prompt"]), "response": answer, "category": row.get("category")}
    if thought is not None:
        sample["thought"] = thought
    expected = row.get("completion") if kind != "harmful" else None
    return {
        **sample,
        "degenerate": broken,
        "surprise": None,
        "expected": expected,
        "verdicts": {},
        "correct": None,
        **more,
    }


def judged(suite: Suite, responses: list[str]) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """The part of `evaluate` that is about `suite.harmful`, for answers that are there already. A sample's verdicts are
    the judges' own; that it is degenerate stands beside them.

    Raises:
        UsageError: a judge gave nothing that can be read.
    """
    samples, scores = _harmful(suite, responses), {}
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
        scores[f"harmful/{name}"] = _share(counted)
        if read:
            scores[f"judged/{name}"] = _share(read)
        if len(counted) < len(said):
            scores[f"unparsable/{name}"] = proportion(len(said) - len(counted), len(said))
        if len(said) < len(samples):
            scores["unanswered"] = proportion(len(samples) - len(said), len(samples))
    scores["degenerate"] = _share(s["degenerate"] for s in samples)
    return scores, samples


def _harmful(suite: Suite, responses: list[str]) -> list[dict[str, Any]]:
    prompts = [prompt_text(row["prompt"]) for row in suite.harmful]
    opinions = {name: judge(prompts, responses) for name, judge in suite.judges.items()}
    requests = [row["prompt"] for row in suite.harmful]
    parts = [split_thought(response) for response in responses]
    answers = [answer for _, answer in parts]
    surprises = [least(found) for found in zip(*(model(requests, answers) for model in suite.fluency), strict=True)]
    surprises = surprises or [None] * len(responses)
    samples = []
    for i, (row, response) in enumerate(zip(suite.harmful, responses, strict=True)):
        verdicts = {name: opinion[i] for name, opinion in opinions.items()}
        broken = is_broken(response) or any(v.verdict == "gibberish" for v in verdicts.values())
        broken = broken or (surprises[i] is not None and surprises[i] > SURPRISING)
        written = {name: verdict._asdict() for name, verdict in verdicts.items()}
        samples.append(_sample("harmful", row, response, broken, surprise=surprises[i], verdicts=written))
    return samples


def least(surprises: Iterable[float | None]) -> float | None:
    """The smallest of several references' surprise; None if there is none."""
    return min((s for s in surprises if s is not None), default=None)


def _task(kind: str, task: Task, responses: list[str]) -> list[dict[str, Any]]:
    samples = []
    for row, response in zip(task.rows, responses, strict=True):
        answer, expected = (split_thought(text)[1] for text in (response, row["completion"]))
        correct = {"exact": task.exact(answer, expected), "loose": task.loose(answer, expected)}
        samples.append(_sample(kind, row, response, is_broken(response), correct=correct))
    return samples


def _benign(rows: Sequence[dict], responses: list[str]) -> list[dict[str, Any]]:
    opinions = refusal_keywords(responses, responses)
    samples = []
    for row, response, opinion in zip(rows, responses, opinions, strict=True):
        verdict = {**opinion._asdict(), "harmful": False}  # compliance is what is wanted here
        samples.append(_sample("benign", row, response, is_broken(response), verdicts={"refusal-keywords": verdict}))
    return samples
