"""Thoughts, which a model writes before its answer, and the marks around them."""

from __future__ import annotations

import re

Marks = tuple[str, str]
"""The text that opens a thought, and the text that closes it."""
THINK, END = "<think>", "</think>"
"""The marks in the answers of `tunevax.scoring.generation`, whatever the model's own marks are."""
THOUGHTS = (
    (THINK, END), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)  # fmt: skip
"""Marks around a thought, of the families that have one. A template that holds one of a pair's marks uses the pair."""
WORDS = THOUGHTS[1:4]
"""Marks that may be words of an answer: unless the template has them, they count only at the head of a text."""


def split_thought(text: str, marks: Marks | None = None) -> tuple[str | None, str]:
    """The thought in a text, or None, and the answer without it, which is empty where the thought has no end.

    A closing mark without an opening one ends a thought that the generation prompt opened, or that mentions the mark.
    Without `marks`, those of any family in `THOUGHTS` count.
    """
    marks = marks or _marks_in(text)
    if marks is None or not any(mark in text for mark in marks):
        return None, text
    opening, closing = map(re.escape, marks)
    marked = rf"{opening}(.*?)(?:{closing}|\Z)"
    thoughts, answer = re.findall(marked, text, re.DOTALL), re.sub(marked, "", text, flags=re.DOTALL)
    before, end, answer = answer.rpartition(marks[1])
    thoughts += [before] if end else []
    return "\n".join(t.strip() for t in thoughts if t.strip()), answer.strip()


def _marks_in(text: str) -> Marks | None:
    anywhere = (pair for pair in THOUGHTS if pair not in WORDS and any(mark in text for mark in pair))
    return marks_at_the_head(text) or next(anywhere, None)


def marks_at_the_head(text: str) -> Marks | None:
    """The marks of the thought that a text begins with."""
    return next((pair for pair in THOUGHTS if text.lstrip().startswith(pair[0])), None)


def marked_thought(text: str, marks: Marks | None, opened: bool) -> str:
    """A model's output with its thought between `THINK` and `END`; `marks` are of the model's template, and `opened`
    says that the text begins inside a thought."""
    if not opened and (marks is None or not any(mark in text for mark in marks)):
        marks = _marks_in(text)
    if marks is None:
        return text
    if opened and marks[0] not in text.partition(marks[1])[0]:
        text = marks[0] + text
    return joined(*split_thought(text, marks), ended=marks[1] in text)


def joined(thought: str | None, answer: str, ended: bool = False) -> str:
    """One text of a thought and an answer, the inverse of `split_thought`; `ended`: the thought has an end although no
    answer follows."""
    if thought is None:
        return answer
    thought = thought.replace(THINK, "").replace(END, "")
    return f"{THINK}\n{thought}\n{END}\n\n{answer}" if answer or ended else f"{THINK}{thought}"


def ends_inside(text: str, marks: Marks | None) -> bool:
    """Whether a text ends inside a thought with these marks."""
    return marks is not None and text.rfind(marks[0]) > text.rfind(marks[1])
