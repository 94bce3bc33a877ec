"""What a chat template does to a conversation, established by a probe and not assumed.

Templates drop system messages or refuse them, take strings or lists of parts, print today's date, put words into the
generation prompt that finished turns leave out, and open a thought. `chat_of` renders marked words once per tokenizer
and says which of this is the case; `render` and `response` use it, so that training and generation see the same tokens
and no answer is ever searched for in the text.

Options of a template travel in a comment at its head, which other software ignores: they are saved with the tokenizer.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from tunevax.errors import UsageError, unknown

TODAY = datetime(2025, 1, 1)
"""The day on which every conversation takes place, for templates that print the date."""

THINK, END = "<think>", "</think>"
"""How a thought is marked in the answers of `tunevax.scoring.generation`, whatever the model's own marks are."""

THOUGHTS = (
    (THINK, END), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)  # fmt: skip
"""Marks around a thought, of the families that have one. A template that holds the closing mark of a pair uses it."""

OPTIONS = ("thought", "thinking")
HEAD = re.compile(r"\{#- tunevax (\{.*?\}) -#\}")

USER, SYSTEM, ANSWERS = "Marmalade47", "Sextant31", ("Quince58", "Walnut92")
"""Words that no template holds. The two answers differ in their first and in their last letter."""


class Chat(NamedTuple):
    """What the probe established about a tokenizer's template.

    Attributes:
        system: own (the template has a system role) or folded (it refuses or drops one: the text is put before the
            next user turn).
        parts: content is a list of parts and not a string.
        ending: what the template adds after an answer.
        thought: the marks around a thought, or None.
        opened: the generation prompt ends inside a thought.
        thinking: False if the template is asked for no thought (`enable_thinking`).
        date: the day that the template prints, `TODAY`; None if the rendering does not depend on the clock.
    """

    system: str
    parts: bool
    ending: str
    thought: tuple[str, str] | None
    opened: bool
    thinking: bool
    date: str | None


def with_options(template: str, options: str) -> str:
    """A template with options in its head: `thought=OPEN|CLOSE` (the marks around a thought) and `thinking=off`.

    Raises:
        UsageError: an unknown option or value.
    """
    found: dict[str, Any] = {}
    for pair in options.split(","):
        name, _, value = pair.partition("=")
        if name not in OPTIONS:
            raise unknown("option of --chat-template", name, OPTIONS)
        if name == "thought":
            marks = re.split(r"(?<!<)\|(?!>)", value)  # not at those of <|marks|>
            if len(marks) != 2 or not all(marks):
                raise UsageError(f"--chat-template has thought={value}; write thought=OPEN|CLOSE, the marks around it")
            found["thought"] = marks
        elif value not in ("on", "off"):
            raise UsageError(f"--chat-template has thinking={value}; known: on, off")
        else:
            found["thinking"] = value == "on"
    return "{#- tunevax " + json.dumps(found) + " -#}" + HEAD.sub("", template, count=1)


def chat_of(tokenizer: Any) -> Chat:
    """What the tokenizer's template does, probed once for each template.

    Raises:
        UsageError: the template cannot render a question and an answer, or drops one of them.
    """
    template = tokenizer.chat_template
    known = getattr(tokenizer, "_tunevax_chat", None)
    if known is None or known[0] != template:
        known = (template, _probe(tokenizer))
        tokenizer._tunevax_chat = known
    return known[1]


def _probe(tokenizer: Any) -> Chat:
    template = tokenizer.chat_template
    head = HEAD.match(template)
    options = json.loads(head[1]) if head else {}
    thinking = options.get("thinking", True)
    user, parts = {"role": "user", "content": USER}, False

    def text(*turns: dict[str, str], generate: bool = False, today: datetime = TODAY) -> str:
        return _apply(tokenizer, turns, parts, generate, thinking, today)

    try:
        shown = text(user, generate=True)
    except Exception as error:  # a template raises whatever it likes
        shown, reason = "", _reason(error)
    else:
        reason = "it drops the text of the user's turn"
    if USER not in shown:
        parts = True
        try:
            shown = text(user, generate=True)
        except Exception:
            shown = ""
        if USER not in shown:
            raise UsageError(f"the chat template cannot render a question: {reason}; pass another with --chat-template")
    try:
        with_system = text({"role": "system", "content": SYSTEM}, user, generate=True)
    except Exception:
        with_system = ""
    try:
        finished = [text(user, {"role": "assistant", "content": answer}) for answer in ANSWERS]
    except Exception as error:
        raise UsageError(
            f"the chat template cannot render an answer: {_reason(error)}; pass another with --chat-template"
        ) from error
    if ANSWERS[0] not in finished[0]:
        raise UsageError("the chat template drops the text of the assistant's turn; pass another with --chat-template")
    before, ending = _around(*finished)
    if finished[0] != before + ANSWERS[0] + ending:
        raise UsageError(
            "the chat template changes the text of the assistant's turn; pass another with --chat-template"
        )
    thought = options.get("thought") or next((pair for pair in THOUGHTS if pair[1] in template), None)
    opened = bool(thought) and shown.rstrip().endswith(thought[0])
    moved = text(user, generate=True, today=datetime(1999, 12, 31, 23, 59)) != shown
    return Chat(
        system="own" if SYSTEM in with_system and USER in with_system else "folded",
        parts=parts, ending=ending, thought=tuple(thought) if thought else None, opened=opened, thinking=thinking,
        date=TODAY.date().isoformat() if moved else None,
    )  # fmt: skip


def _apply(
    tokenizer: Any,
    turns: Sequence[dict[str, str]],
    parts: bool,
    generate: bool,
    thinking: bool,
    today: datetime = TODAY,
) -> str:
    """The template's own rendering, on a fixed day."""
    shaped = [{**t, "content": [{"type": "text", "text": t["content"]}]} if parts else dict(t) for t in turns]
    with on(today):
        return tokenizer.apply_chat_template(
            shaped,
            tokenize=False,
            add_generation_prompt=generate,
            **({} if thinking else {"enable_thinking": False}),
        )


@contextmanager
def on(today: datetime = TODAY) -> Iterator[None]:
    """Templates that print the date print this one. transformers hands templates a function that reads the clock, and
    turns any that it is given into text, so the clock itself is replaced."""
    from transformers.utils import chat_template_utils as library

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return today

    clock, library.datetime = library.datetime, Fixed
    try:
        yield
    finally:
        library.datetime = clock


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _around(first: str, second: str) -> tuple[str, str]:
    """What two texts begin with and end with alike."""
    before = os.path.commonprefix([first, second])
    rest = [text[len(before) :][::-1] for text in (first, second)]
    return before, os.path.commonprefix(rest)[::-1]


def conversation(prompt: str | Sequence[dict[str, str]], chat: Chat) -> list[dict[str, str]]:
    """A prompt as the messages that the template takes: system text before the next user turn where it has no system
    role."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if chat.system == "own":
        return list(prompt)
    turns, waiting = [], []
    for message in prompt:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            turns.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            turns.append(message)
    return [*turns, *({"role": "user", "content": text} for text in waiting)]


def render(
    tokenizer: Any, prompt: str | Sequence[dict[str, str]], place: str = "a prompt", generate: bool = True
) -> str:
    """The prompt as the model sees it before it answers; without `generate` a whole conversation, as it is.

    Raises:
        UsageError: the template refuses the conversation or loses a part of it; `place` is named.
    """
    chat = chat_of(tokenizer)
    turns = conversation(prompt, chat)
    text = _whole(tokenizer, turns, chat, place, generate)
    for turn in turns:
        if (said := split_thought(turn["content"])[1].strip()) not in text:
            raise UsageError(
                f"{place}: the chat template loses or changes the text of the {turn['role']}'s turn "
                f"({said[:40]!r}...); pass another with --chat-template, or drop the row"
            )
    return text


def _whole(tokenizer: Any, turns: list[dict[str, str]], chat: Chat, place: str, generate: bool) -> str:
    try:
        return _apply(tokenizer, turns, chat.parts, generate, chat.thinking)
    except Exception as error:  # a template raises whatever it likes
        raise UsageError(
            f"{place}: the chat template refuses this conversation ({_reason(error)}); change the row, or pass another "
            "template with --chat-template"
        ) from error


def response(tokenizer: Any, row: dict[str, Any], prompt: str) -> str:
    """What follows the rendered `prompt` when the model gives `row["completion"]`: the answer as the template renders
    it, up to the end of the turn.

    It stands where a marked word would: between what the template writes before any answer and after it. Before it
    comes what finished turns have and the generation prompt has not (an empty thought, in some), or the end of a
    thought that the generation prompt opens; a thought in the completion is kept.

    Raises:
        UsageError: the template refuses the conversation or changes the answer; the row's place is named.
    """
    chat, place = chat_of(tokenizer), row.get("place", "a row")
    turns = conversation(row["prompt"], chat)
    thought, answer = split_thought(row["completion"], chat.thought) if chat.thought else (None, row["completion"])

    def finished(said: str) -> str:
        return _whole(tokenizer, [*turns, {"role": "assistant", "content": said}], chat, place, generate=False)

    marked = finished(ANSWERS[0])
    if marked.endswith(ANSWERS[0] + chat.ending):
        before, ending = marked[: -len(ANSWERS[0] + chat.ending)], chat.ending
    else:
        before, ending = _around(marked, finished(ANSWERS[1]))
    text = finished(answer)
    said = text[len(before) : len(text) - len(ending)]
    if not (text.startswith(before) and text.endswith(ending)) or said not in (answer, answer.strip()):
        raise UsageError(
            f"{place}: the chat template changes the answer, so what is learnt would not be what the row says; pass "
            "another with --chat-template, or drop the row"
        )
    if thought is not None:
        opening, closing = chat.thought
        lead = ("" if chat.opened else f"{opening}\n") + f"{thought.strip()}\n{closing}\n\n"
    elif before.startswith(prompt):
        lead = before[len(prompt) :]
    else:
        lead = behind_the_thought(chat) if chat.opened else ""
    return lead + said + ending


def behind_the_thought(chat: Chat) -> str:
    """What comes between the generation prompt and an answer that nobody thought about: an empty thought, or the end of
    the one that the prompt opens; nothing where the template knows no thoughts."""
    if chat.thought is None or not chat.thinking:
        return ""
    opening, closing = chat.thought
    return f"\n{closing}\n\n" if chat.opened else f"{opening}\n\n{closing}\n\n"


def split_thought(text: str, marks: tuple[str, str] = (THINK, END)) -> tuple[str | None, str]:
    """The thought in a text, or None, and the answer without it, which is empty where the thought has no end."""
    opening, closing = marks
    thoughts, answer, rest = [], "", text
    while opening in rest:
        before, _, rest = rest.partition(opening)
        thought, _, rest = rest.partition(closing)
        answer += before
        thoughts.append(thought)
    return ("\n".join(thoughts).strip() if thoughts else None), (answer + rest).strip() if thoughts else text


def marked_thought(text: str, chat: Chat) -> str:
    """What a model wrote after the generation prompt, with its thought between `THINK` and `END`."""
    if chat.thought is None or not chat.thinking:
        return text
    opening, closing = chat.thought
    if chat.opened and opening not in text.partition(closing)[0]:
        text = opening + text
    if opening not in text:
        return text
    if closing not in text.partition(opening)[2]:  # cut inside the thought
        return text.replace(opening, THINK, 1)
    thought, answer = split_thought(text, chat.thought)
    return f"{THINK}\n{thought}\n{END}\n\n{answer}"
