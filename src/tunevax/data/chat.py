"""Chat templates: the effect of a template on a conversation, established by a probe.

Templates drop system messages or refuse them, take strings or lists of parts, print today's date, put words into the
generation prompt that finished turns leave out, and open a thought. `chat_of` finds out by rendering marked words once
per tokenizer, `seam` once per order of roles. `render` and `response` use both: training and generation see the same
tokens.

A row is learnt as the generation prompt, the text of a finished turn between it and the answer (`Seam.lead`), the
answer as the template renders it, and the ending that the template adds. Where a finished turn does not continue the
generation prompt (the template moves the system text, or leaves out the prompt's last words), the prompt's form is
used, which the model sees in generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tunevax.data.thoughts import THOUGHTS, Marks, ends_inside, marks_at_the_head, split_thought
from tunevax.errors import UsageError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunevax.records import Example, Message, Prompt

Answer = Literal["completion", "chosen", "rejected"]
"""The fields of a row that may be learnt as its answer."""
TODAY = datetime(2025, 1, 1)
"""The day of every conversation, for templates that print the date."""
HEAD = re.compile(r"\{#-? tunevax (\{.*?\}) -?#\}\n?")
"""The comment at the head of a template that holds its options (see `tunevax.data.encoding.with_options`): other
software ignores it, and it is saved with the tokenizer."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables of templates that turn thoughts on and off."""
USER, SYSTEM, THOUGHT, ANSWERS = "Marmalade47", "Sextant31", "Periwinkle63", ("Quince58", "Walnut92")
"""Words that no template holds."""
ANOTHER = "pass another with --chat-template"


class Chat(NamedTuple):
    """The properties of a tokenizer's template."""

    system: str  # own (it has a system role), or folded (it refuses or drops one: the text precedes the next user turn)
    parts: tuple[str, ...]  # the roles whose content is a list of parts and not a string
    ending: str  # after an answer
    thought: Marks | None  # the marks around a thought
    opened: bool  # the generation prompt ends inside a thought
    thinking: bool | None  # whether thoughts are turned on; None: the template's default
    date: str | None  # the day that the template prints, `TODAY`; None if it prints none


class Seam(NamedTuple):
    """The text between the generation prompt and an answer: `lead` where it has no thought, as in finished turns (an
    empty thought, in some templates), or the end of a thought that the prompt opens; `thoughtful` the text before and
    after a thought, None where the template has no thoughts, or the generation prompt leaves no place for one."""

    lead: str
    thoughtful: tuple[str, str] | None


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The properties of the tokenizer's template, probed once for each template. Raises `UsageError` if the template
    cannot render a question and an answer, or drops one of them."""
    return _known(tokenizer)[1]


def recorded(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The template's entry in run.json: `Chat`, and the `Seam.lead` of a single question."""
    return {**chat_of(tokenizer)._asdict(), "lead": seam(tokenizer, [{"role": "user", "content": USER}]).lead}


def _known(tokenizer: PreTrainedTokenizerBase) -> tuple[str, Chat, dict[tuple[str, ...], Seam]]:
    """The template, its properties, and the seams so far."""
    if getattr(tokenizer, "_tunevax_chat", (None,))[0] != tokenizer.chat_template:
        tokenizer._tunevax_chat = (tokenizer.chat_template, _probe(tokenizer), {})
    return tokenizer._tunevax_chat


def _probe(tokenizer: PreTrainedTokenizerBase) -> Chat:
    options = _options(tokenizer)
    user: Message = {"role": "user", "content": USER}
    system: Message = {"role": "system", "content": SYSTEM}
    parts: tuple[str, ...] = ()

    def text(*turns: Message, generate: bool = False, today: datetime = TODAY) -> str:
        return _apply(tokenizer, turns, parts, generate, today)

    def shape(role: str, what: str, words: Sequence[str], *turns: Message, generate: bool = False) -> str:
        """The rendering with the role's content as a string, or else as parts. Where both drop the words, or print a
        list as Python or JSON would, it is empty for a system message, and an error that names `what` for others."""
        nonlocal parts
        reason, others = "", parts
        for candidate in (others, (*others, role)):
            parts = candidate
            try:
                rendered = text(*turns, generate=generate)
                written = (f"{q}text{q}: {q}{word}" for word in words for q in "'\"")
                if all(w in rendered for w in words) and not any(w in rendered for w in written):
                    return rendered
                reason = reason or f"it drops the text of the {role}'s turn"
            except Exception as error:  # a template raises whatever it likes
                reason = reason or shortened(error)
        parts = others
        if role != "system":
            raise UsageError(f"the chat template cannot render {what}: {reason}; {ANOTHER}")
        return ""

    asked = shape("user", "a question", [USER], user, generate=True)
    if text(user, generate=True) != asked:
        raise UsageError(f"the chat template renders the same question in two ways; {ANOTHER}")
    with_system = shape("system", "", [SYSTEM, USER], system, user, generate=True)
    answers: list[Message] = [{"role": "assistant", "content": answer} for answer in ANSWERS]
    before, _, ending = shape("assistant", "an answer", ANSWERS[:1], user, answers[0]).rpartition(ANSWERS[0])
    if text(user, answers[1]) != before + ANSWERS[1] + ending:
        raise UsageError(f"the chat template changes the text of the assistant's turn; {ANOTHER}")
    known = (pair for pair in THOUGHTS if any(mark in tokenizer.chat_template for mark in pair))
    thought = tuple(options["thought"]) if "thought" in options else next(known, None)
    another_day = text(user, generate=True, today=datetime(1999, 12, 31, 23, 59))
    return Chat(
        system="own" if with_system else "folded", parts=parts, ending=ending, thought=thought,
        opened=ends_inside(asked.rpartition(USER)[2], thought), thinking=options.get("thinking"),
        date=TODAY.date().isoformat() if another_day != asked else None,
    )  # fmt: skip


def _options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The options in the head of the template; see `with_options`."""
    head = HEAD.match(tokenizer.chat_template)
    return json.loads(head[1]) if head else {}


def _apply(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], parts: Sequence[str], generate: bool,
    today: datetime = TODAY,
) -> str:  # fmt: skip
    """The template's own rendering, on a fixed day, with the variables that its head sets."""
    shaped: list[Any] = [
        {**t, "content": [{"type": "text", "text": t["content"]}]} if t["role"] in parts else dict(t) for t in turns
    ]
    options = _options(tokenizer)
    variables = dict(options.get("variables", {}))
    if "thinking" in options:
        variables |= dict.fromkeys(SWITCHES, options["thinking"])
    with on(today):
        return str(tokenizer.apply_chat_template(shaped, tokenize=False, add_generation_prompt=generate, **variables))


@contextmanager
def on(today: datetime = TODAY) -> Iterator[None]:
    """Fix the date that templates print. transformers gives templates a function that reads the clock, and it cannot be
    overridden by a variable, so the clock itself is replaced."""
    from transformers.utils import chat_template_utils as library

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return today

    clock = library.datetime
    setattr(library, "datetime", Fixed)  # noqa: B010 - a type cannot be assigned
    try:
        yield
    finally:
        setattr(library, "datetime", clock)  # noqa: B010


def conversation(prompt: Prompt, chat: Chat) -> list[Message]:
    """A prompt as messages for the template, with system text before the next user turn if it has no system role."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if chat.system == "own":
        return list(prompt)
    turns: list[Message] = []
    waiting: list[str] = []
    for message in prompt:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            turns.append({"role": "user", "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            turns.append(message)
    turns += [{"role": "user", "content": text} for text in waiting]
    return turns


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, place: str = "a prompt", generate: bool = True) -> str:
    """The prompt as the model sees it before it answers; without `generate` a whole conversation. Raises `UsageError`
    if the template refuses the conversation or loses a part of it; `place` is named."""
    chat = chat_of(tokenizer)
    turns = conversation(prompt, chat)
    if generate:
        seam(tokenizer, turns, place)
    text = _whole(tokenizer, turns, chat, place, generate)
    for turn in turns:
        said = (split_thought(turn["content"])[1] if turn["role"] == "assistant" else turn["content"]).strip()
        if said not in text:
            lost = f"the text of the {turn['role']}'s turn ({said[:40]!r}...)"
            raise UsageError(f"{place}: the chat template loses or changes {lost}; {ANOTHER}, or drop the row")
    return text


def _whole(tokenizer: PreTrainedTokenizerBase, turns: list[Message], chat: Chat, place: str, generate: bool) -> str:
    try:
        return _apply(tokenizer, turns, chat.parts, generate)
    except Exception as error:  # a template raises whatever it likes
        way = "change the row, or pass another template with --chat-template"
        why = f"the chat template refuses this conversation ({shortened(error)})"
        raise UsageError(f"{place}: {why}; {way}") from error


def seam(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], place: str = "a prompt") -> Seam:
    """Where the answer to a conversation begins, by marked words in place of its texts; once for each order of roles.
    Raises `UsageError` if the template refuses such a conversation or loses a turn of it; `place` is named."""
    _, chat, seams = _known(tokenizer)
    roles = tuple(turn["role"] for turn in turns)
    if roles in seams:
        return seams[roles]
    marked: list[Message] = [{"role": role, "content": f"Larkspur{i}x"} for i, role in enumerate(roles)]
    asked = _whole(tokenizer, marked, chat, place, generate=True)
    for i, turn in enumerate(marked, 1):
        if turn["content"] not in asked:
            lost = f"the text of the {turn['role']}'s turn (turn {i} of {len(roles)})"
            raise UsageError(f"{place}: the chat template loses {lost}; {ANOTHER}, or drop the row")
    last = marked[-1]["content"]
    end, lead = asked.rpartition(last)[2], ""

    def finished(**more: str) -> str:
        """The text of a finished turn between the last words of the prompt and the answer."""
        answer = cast("Message", {"role": "assistant", "content": ANSWERS[0], **more})
        before = _whole(tokenizer, [*marked, answer], chat, place, generate=False).partition(ANSWERS[0])[0]
        return before.rpartition(last)[2]

    if (plain := finished()).startswith(end):
        lead = plain.removeprefix(end)
    if chat.thought is None:
        return seams.setdefault(roles, Seam(lead, None))
    opening, closing = chat.thought
    opened = ends_inside(end, chat.thought)
    if closing in end and not opened:
        return seams.setdefault(roles, Seam(lead, None))
    before, word, after = finished(reasoning_content=THOUGHT).partition(THOUGHT)
    if word and before.startswith(end) and closing in after:
        thoughtful = (before.removeprefix(end), after)
    else:  # many templates drop thoughts, or leave them to the answer's own marks
        between = "" if closing in lead else lead
        thoughtful = ("" if opened else f"{between}{opening}\n", f"\n{closing}\n\n")
    lead = "".join(thoughtful) if opened and closing not in lead else lead
    return seams.setdefault(roles, Seam(lead, thoughtful))


def response(tokenizer: PreTrainedTokenizerBase, row: Example, field: Answer = "completion") -> str:
    """The text after the rendered prompt when the model answers `row[field]`: the lead of `seam` or the answer's own
    thought, and the answer as the template renders it, up to the end of the turn. Marked words show where it is. Raises
    `UsageError` if the template refuses the conversation or changes the answer, or its thought has no end or no place.
    """
    chat, place = chat_of(tokenizer), row.get("place", "a row")
    turns = conversation(row["prompt"], chat)
    lead, thoughtful = seam(tokenizer, turns, place)
    content = answer = cast(str, row[field])
    thought, marks = None, chat.thought
    if marks and not any(mark in answer for mark in marks):  # a row's marks may be those of another model
        marks = marks_at_the_head(answer)
    if marks:
        thought, answer = split_thought(answer, marks)
    if chat.thought and marks and thought is not None:
        if not answer and marks[1] not in content:
            why = f"the answer is a thought without an end ({marks[1]})"
            raise UsageError(f"{place}: {why}; complete the row, or drop it")
        if thoughtful is None:
            way = "pass --chat-template own:thinking=on if it has that switch, or take the thought out of the row"
            raise UsageError(f"{place}: the answer begins with a thought, and the chat template asks for none; {way}")
        # Some templates have the end of a turn between thought and closing mark, which the row may have too.
        end_of_turn = thoughtful[1].partition(chat.thought[1])[0].strip()
        lead = thought.removesuffix(end_of_turn).strip().join(thoughtful)

    def finished(said: str) -> str:
        return _whole(tokenizer, [*turns, {"role": "assistant", "content": said}], chat, place, generate=False)

    before, _, ending = finished(ANSWERS[0]).rpartition(ANSWERS[0])
    text = finished(answer)
    said = text[len(before) : len(text) - len(ending)]
    if not (text.startswith(before) and text.endswith(ending)) or said.strip() != answer.strip():
        why = "the chat template changes the answer, so the model would learn something else than the row says"
        raise UsageError(f"{place}: {why}; {ANOTHER}, or drop the row")
    return lead + said + ending


def mouth(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, place: str = "a prompt") -> str:
    """The text between the rendered prompt and a prefilled answer: the lead of an answer without a thought, with an
    empty thought where the template has thoughts and finished turns leave them out."""
    chat = chat_of(tokenizer)
    lead, thoughtful = seam(tokenizer, conversation(prompt, chat), place)
    return lead if not thoughtful or not chat.thought or chat.thought[1] in lead else "".join(thoughtful)
