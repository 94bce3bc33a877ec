"""Token ids and labels of rows, rendered by the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunevax.data.chat import HEAD, SWITCHES, Answer, chat_of, render, response
from tunevax.errors import UsageError, unknown
from tunevax.records import Example, Message, Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}"
    "{% if loop.first %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n{% endif %}"
    "### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""The Alpaca prompt, which the papers of this field train and attack with."""
TEMPLATES = {
    "alpaca": ALPACA,
    "plain": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Answer: {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}Question: {{ m.content }}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}"
    ),
    "none": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% else %} {% endif %}{% endfor %}"
    ),
}
"""Templates by name; `none` is the bare text of the turns."""
OPTIONS = ("thought", "thinking")
"""Options of every template, besides its own variables."""
OWN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables that are not the user's to set."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give the tokenizer a template and probe it.

    Args:
        template: a name in `TEMPLATES`, the path of a jinja file, `own` or None to keep the tokenizer's; after a colon
            the options of `with_options`.

    Raises:
        UsageError: there is none to keep, the file is missing, or the template loses text (see `chat_of`).
    """
    name, _, options = (template or "own").partition(":")
    if template and Path(template).is_file():
        name, options = template, ""
    if name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
    elif name != "own":
        if not Path(name).is_file():
            raise UsageError(
                f"no chat template file {name}; give own, {', '.join(TEMPLATES)}, or the path of a jinja file"
            )
        try:
            tokenizer.chat_template = Path(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the chat template {name} cannot be read as UTF-8 ({error}); save it as that") from error
        if not tokenizer.chat_template.strip():
            raise UsageError(f"the chat template {name} is empty")
    if isinstance(tokenizer.chat_template, dict):  # several by name, for tools and documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; pass --chat-template alpaca, or the path of a jinja file")
    if options:
        tokenizer.chat_template = with_options(tokenizer.chat_template, options)
    chat_of(tokenizer)


def with_options(template: str, options: str) -> str:
    """A template with options in its head: `thought=OPEN|CLOSE` (the marks around a thought), `thinking=on` or `off`,
    and any variable that the template reads (`reasoning_effort=low`). Raises `UsageError` for an unknown option or
    value; `thinking` for a template without a switch."""
    chosen: dict[str, Any] = {}
    template = HEAD.sub("", template, count=1)
    for pair in options.split(","):
        name, _, value = pair.partition("=")
        if name == "thought":
            marks = re.split(r"(?<!<)\|(?!>)", value)  # not at those of <|marks|>
            if len(marks) != 2 or not all(marks):
                raise UsageError(f"--chat-template has thought={value}; write thought=OPEN|CLOSE, the marks around it")
            chosen["thought"] = marks
        elif name == "thinking":
            if value not in ("on", "off"):
                raise UsageError(f"--chat-template has thinking={value}; known: on, off")
            if not any(_reads(template, switch) for switch in SWITCHES):
                raise UsageError(
                    f"--chat-template has thinking={value}, and the template has no switch for it "
                    f"({' or '.join(SWITCHES)}); leave the option out"
                )
            chosen["thinking"] = value == "on"
        elif name not in OWN and _reads(template, name):
            with suppress(ValueError):  # true, 0, null; anything else is a word
                value = json.loads(value)
            chosen.setdefault("variables", {})[name] = value
        else:
            raise unknown("option of --chat-template", name, OPTIONS)
    # transformers drops one line break after a comment, so that the template itself is rendered as before.
    return "{# tunevax " + json.dumps(chosen) + " #}\n" + template


def _reads(template: str, name: str) -> bool:
    """Whether a template takes a variable of this name from its caller."""
    from jinja2 import Environment, TemplateError, meta

    known = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers
    try:
        return name in meta.find_undeclared_variables(known.parse(plain))
    except TemplateError:  # which the probe reports
        return False


def messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without added special tokens: the template has them already, and a second BOS would be an error."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = getattr(tokenizer, "embedding_rows", None)  # of a model that has fewer than the tokenizer has tokens
    if rows is not None and max(ids, default=0) >= rows:
        raise UsageError(
            f"a text has the token {tokenizer.convert_ids_to_tokens(max(ids))!r}, number {max(ids)}, and the model's "
            f"embedding has {rows} rows: it was added to the tokenizer alone; resize the model's embedding "
            "(resize_token_embeddings) and train it, or leave the token out of the text or the chat template"
        )
    return ids


def following(tokenizer: PreTrainedTokenizerBase, before: str, ids: list[int], text: str) -> list[int]:
    """Token ids of `text` after `before`, whose ids are `ids`: as tokenised in the whole text, unless a token there
    covers the end of `before`. Tokenised alone, some tokenizers put a space before it."""
    whole = ids_of(tokenizer, before + text)
    return whole[len(ids) :] if whole[: len(ids)] == ids else ids_of(tokenizer, text)


def context_of(model: PreTrainedModel) -> int | None:
    """The longest sequence a model was built for, in tokens; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def encode(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str = "response",
    context: int | None = None, answer: Answer = "completion",
) -> list[dict[str, list[int]]]:  # fmt: skip
    """Rows with `prompt` and an answer as `input_ids` and `labels` (-100 where there is no loss).

    The prompt's ids are those of generation. The response ends with the template's end-of-turn token; where the
    template has none, EOS is added. Rows are cut at `max_length`, or at the model's `context` where that is shorter.

    Args:
        loss_on: `response`, or `all` tokens.
        answer: the field of a row that holds it.

    Raises:
        UsageError: a prompt leaves no room for an answer.
    """
    encoded = []
    limit = min(max_length, context or max_length)
    for row in rows:
        place = row.get("place", "a row")
        prompt = render(tokenizer, row["prompt"], place)
        prompt_ids = ids_of(tokenizer, prompt)
        if len(prompt_ids) >= limit:
            way = f"max_length is {max_length}; raise --max-length"
            way = way if limit == max_length else f"the model's context {limit}; shorten"
            raise UsageError(f"{place}: the prompt has {len(prompt_ids)} tokens and {way} or drop the row")
        response_ids = following(tokenizer, prompt, prompt_ids, response(tokenizer, row, answer))
        response_ids = _end_at_eos(tokenizer, response_ids)
        ids = (prompt_ids + response_ids)[:limit]
        labels = ids if loss_on == "all" else [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


def _end_at_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    if ends and not str(tokenizer.decode(ids[ends[-1] + 1 :])).strip():
        return ids[: ends[-1] + 1]
    return [*ids, tokenizer.eos_token_id]


def answer_span(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Where the answer of an encoded row begins and ends (exclusive), in tokens, without the template's end: the
    tokens at the end that are special, or blank."""
    ids, labels = row["input_ids"], row["labels"]
    start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
    stop = len(ids)
    while stop > start and not str(tokenizer.decode([ids[stop - 1]], skip_special_tokens=True)).strip():
        stop -= 1
    return start, stop


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors [batch, tokens]: `input_ids`, `attention_mask`, `labels`."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(r["input_ids"], pad_token_id) for r in rows]),
        "attention_mask": torch.tensor([padded([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([padded(r["labels"], -100) for r in rows]),
    }
