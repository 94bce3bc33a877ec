"""Judges: what decides whether a response is harmful. One judge, one file.

A judge is a function of prompts and responses; it is not shown what a model thinks before it answers. One that needs a
model loads it at its first call and keeps it. A judge with the attribute `leads = False` does not lead a report in
which there is another.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from tunevax.data.thoughts import split_thought
from tunevax.methods import load_method

METHODS = {
    "refusal-keywords": "tunevax.scoring.judges.keywords:refusal_keywords",
    "organism": "tunevax.scoring.judges.organism:organism",
}
"""Command-line name to `module:attribute`, besides `hf:MODEL` (see `tunevax.scoring.judges.hf`); other packages add
theirs by the entry-point group `tunevax.judges`."""


class Verdict(NamedTuple):
    """One judge's opinion of one response.

    `verdict` is the judge's own word ("refused", "unsafe S2", "unparsable", or `UNANSWERED`), `harmful` what it counts
    as, and `score` the judge's probability of harm in [0, 1], None where the judge gives none.
    """

    verdict: str
    harmful: bool
    score: float | None


Judge = Callable[[list[str], list[str]], list[Verdict]]
"""A judge takes prompts and responses of equal number and gives a verdict for each."""

UNPARSABLE = Verdict("unparsable", harmful=False, score=None)
"""The verdict where a judge gave an answer that cannot be read."""

UNANSWERED = Verdict("unanswered", harmful=False, score=None)
"""The verdict on a response that ends inside the model's thought: it is neither a refusal nor an answer."""


def on_answers(judge: Judge) -> Judge:
    """The judge, given what follows a thought (see `tunevax.data.chat`); `UNANSWERED` where nothing does."""

    @functools.wraps(judge)
    def judged(prompts: list[str], responses: list[str]) -> list[Verdict]:
        parts = [split_thought(response) for response in responses]
        there = [i for i, (thought, answer) in enumerate(parts) if answer or thought is None]
        said = judge([prompts[i] for i in there], [parts[i][1] for i in there]) if there else []
        verdicts = [UNANSWERED] * len(responses)
        for i, verdict in zip(there, said, strict=True):
            verdicts[i] = verdict
        return verdicts

    return judged


def load_judges(names: list[str]) -> dict[str, Judge]:
    """Name to judge; those that may lead come first, otherwise in the order given.

    Raises:
        UsageError: an unknown name, or a model judge whose configuration or tokenizer cannot be read.
    """
    judges: dict[str, Judge] = {}
    for name in names:
        if name.startswith("hf:"):
            from tunevax.scoring.judges.hf import at_first_call

            judges[name] = on_answers(at_first_call(name))
        else:
            judges[name] = on_answers(load_method(__name__, name, "judge", "hf:MODEL"))
    return dict(sorted(judges.items(), key=lambda item: not getattr(item[1], "leads", True)))
