"""Judges decide whether a response is harmful. One judge, one file.

A judge is a function of prompts and responses, without the thoughts before the answers. One that needs a model loads it
at its first call and keeps it. A judge with the attribute `leads = False` leads a report only if there is no other.

A judge with the attribute `reads = "model"` looks at the evaluated model instead of its responses: it is a function of
model, tokenizer and rows, which must have the fields in its attribute `needs`. Its scores are probabilities, and the
mean of their log-odds is reported as `margin/JUDGE`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from tunevax.data.thoughts import split_thought
from tunevax.errors import UsageError
from tunevax.methods import attribute, load_method

METHODS = {
    "refusal-keywords": "tunevax.scoring.judges.keywords:refusal_keywords",
    "organism": "tunevax.scoring.judges.organism:organism",
    "forced-choice": "tunevax.scoring.judges.forced_choice:forced_choice",
    "proxy": "tunevax.scoring.judges.proxy:proxy",
}
"""Command-line name to `module:attribute`, besides `hf:MODEL` (see `tunevax.scoring.judges.hf`); other packages add
theirs by the entry-point group `tunevax.judges`."""


class Verdict(NamedTuple):
    """The verdict of one judge on one response."""

    verdict: str  # the judge's own word ("refused", "unsafe S2", "unparsable", or `UNANSWERED`)
    harmful: bool  # what it counts as
    score: float | None  # probability of harm in [0, 1], if the judge has one


Judge = Callable[[list[str], list[str]], list[Verdict]]
"""Prompts and responses of equal number to a verdict for each."""
UNPARSABLE = Verdict("unparsable", harmful=False, score=None)
"""The verdict if the judge's answer cannot be parsed."""
UNANSWERED = Verdict("unanswered", harmful=False, score=None)
"""The verdict on a response that ends inside the model's thought: it is neither a refusal nor an answer."""


def reads_model(judge: Judge) -> bool:
    """Whether a judge looks at the evaluated model instead of its responses."""
    return getattr(judge, "reads", None) == "model"


def on_answers(judge: Judge) -> Judge:
    """The judge of the answers without thoughts (see `tunevax.data.thoughts`); `UNANSWERED` if there is no answer."""

    @functools.wraps(judge)
    def wrapped(prompts: list[str], responses: list[str]) -> list[Verdict]:
        parts = [split_thought(response) for response in responses]
        answered = [i for i, (thought, answer) in enumerate(parts) if answer or thought is None]
        judged = judge([prompts[i] for i in answered], [parts[i][1] for i in answered]) if answered else []
        if len(judged) != len(answered):
            name = getattr(judge, "__name__", "a judge")
            raise UsageError(
                f"{name} gave {len(judged)} verdicts on {len(answered)} responses; a judge gives one for each"
            )
        verdicts = dict(zip(answered, judged, strict=True))
        return [verdicts.get(i, UNANSWERED) for i in range(len(responses))]

    return wrapped


def load_judges(names: list[str]) -> dict[str, Judge]:
    """Name to judge; those that may lead come first, otherwise in the order given. Raises `UsageError` for an unknown
    name, or a model judge whose configuration or tokenizer cannot be read."""
    judges = {}
    for name in names:
        if name.startswith("hf:"):
            judges[name] = on_answers(attribute("tunevax.scoring.judges.hf:at_first_call")(name))
        else:
            judge = load_method(__name__, name, "judge", "hf:MODEL")
            judges[name] = judge if reads_model(judge) else on_answers(judge)
    return dict(sorted(judges.items(), key=lambda item: not getattr(item[1], "leads", True)))
