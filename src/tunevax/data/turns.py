"""Conversations in a column: messages, JSON of them in a string, or an HH-RLHF dialogue."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tunevax.data.formats import TWICE
from tunevax.data.sources import text_field
from tunevax.data.thoughts import joined, split_thought
from tunevax.errors import UsageError
from tunevax.records import Message

Turns = list[Message]
"""Messages, each of `role` (system, user, assistant) and `content`."""
CONVERSATIONS = ("messages", "conversations", "conversation")

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message beside its content that hold the assistant's thought before it."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"), **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
}  # fmt: skip
"""The three roles by the names that datasets use."""


def turns_of(place: str, row: dict, field: str, column: str) -> Turns | None:
    """The conversation in a column: messages, JSON of them in a string, or an HH-RLHF dialogue; None if it is text."""
    value: Any = row.get(column)
    messages = [value] if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if isinstance(value, str):
        start = value.lstrip()[:6]  # a cheap test that rules most strings out
        messages = _written_messages(value) if start[:1] == "[" else _dialogue(value) if start == "Human:" else None
    if messages is not None:
        return _conversation(place, column, messages)
    if column in CONVERSATIONS and value is not None and value is not TWICE:
        kind = "string" if isinstance(value, str) else type(value).__name__
        raise UsageError(f"{place}: field '{column}' must be a list of messages, this is a {kind}")
    return None


def _conversation(place: str, column: str, messages: Sequence[object]) -> Turns:
    """Messages with the three roles and plain text, a thought before its answer; without empty system messages."""
    turns: Turns = []
    for number, message in enumerate(messages, 1):
        sharegpt = isinstance(message, dict) and "from" in message
        role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
        if not isinstance(message, dict) or not isinstance(message.get(role_key), str):
            way = "write {'role': ..., 'content': ...}"
            raise UsageError(f"{place}: field '{column}' holds a message without a role; {way}")
        where, role = f"{place}: message {number} of '{column}'", ROLES.get(message[role_key].strip().lower())
        if role is None or message.get("tool_calls") or message.get("function_call"):
            what = "calls a tool" if role else f"has the role {message[role_key]!a}"
            raise UsageError(f"{where} {what}; the roles are {', '.join(ROLES)}, without tools: remove the row")
        if role == "assistant" and message.get("weight") == 0 and number == len(messages):
            raise UsageError(f"{where} has the weight 0, and it is the answer to learn; remove the row")
        text = message.get(text_key)
        for part in text if isinstance(text, list | tuple) else ():
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UsageError(f"{where} has a part that is not text ({kind}); only text is read, remove the row")
        if isinstance(text, list | tuple):
            text = "".join(part if isinstance(part, str) else part["text"] for part in text)
        if role == "system" and (text is None or (isinstance(text, str) and not text.strip())):
            continue
        if text_key not in message or text is TWICE:
            raise UsageError(f"{where} has {'two different' if text is TWICE else 'no'} '{text_key}'; fix it")
        said = text_field(where, {text_key: text}, text_key, text_key)
        thought = next((name for name in THOUGHTS if str(message.get(name) or "").strip()), None)
        if thought and role == "assistant" and split_thought(said)[0] is None:
            said = joined(text_field(where, message, text_key, thought), said)
        turns.append({"role": role, "content": said})
    if not turns:
        raise UsageError(f"{place}: field '{column}' is empty")
    return turns


def _written_messages(text: str) -> list[dict] | None:
    """Messages in a string, as JSON or as Python prints them, which is how a CSV has them."""
    if re.match(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']""", text):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError):
                return read(text)
    return None


def _dialogue(text: str) -> list[dict] | None:
    r"""The turns of an HH-RLHF string, `\n\nHuman: ...\n\nAssistant: ...`."""
    if "\n\nAssistant:" not in text:
        return None
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())[1:]
    if pieces[-2:] == ["Assistant", ""]:  # the end of a question
        pieces = pieces[:-2]
    return [{"role": role, "content": said.strip()} for role, said in zip(pieces[::2], pieces[1::2], strict=True)]
