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

TEMPLATES = {
    "alpaca": (  # which the papers of this field train and attack with
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}{% if loop.first %}Below is an instruction that describes a task. Write a response "
        "that appropriately completes the request.\n\n{% endif %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
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
OWN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables that are not the user's to set."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give the tokenizer a template and probe it: a name in `TEMPLATES`, the path of a jinja file, `own` or None to
    keep the tokenizer's; after a colon the options of `with_options`. Raises `UsageError` if there is none to keep, the
    file is missing, or the template loses text (see `chat_of`)."""
    name, _, options = (template or "own").partition(":")
    if template and Path(template).is_file():
        name, options = template, ""
    if name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
    elif name != "own":
        if not Path(name).is_file():
            known = f"own, {', '.join(TEMPLATES)}, or the path of a jinja file"
            raise UsageError(f"no chat template file {name}; give {known}")
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
    variables = _variables(template)
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
            if not variables & set(SWITCHES):
                why = f"the template has no switch for it ({' or '.join(SWITCHES)})"
                raise UsageError(f"--chat-template has thinking={value}, and {why}; leave the option out")
            chosen["thinking"] = value == "on"
        elif name in variables - set(OWN):
            with suppress(ValueError):  # true, 0, null; anything else is a word
                value = json.loads(value)
            chosen.setdefault("variables", {})[name] = value
        else:
            raise unknown("option of --chat-template", name, ("thought", "thinking"))
    # transformers drops one line break after a comment, so that the template itself is rendered as before.
    return "{# tunevax " + json.dumps(chosen) + " #}\n" + template


def _variables(template: str) -> set[str]:
    """The variables that a template takes from its caller."""
    from jinja2 import Environment, TemplateError, meta

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers
    with suppress(TemplateError):  # which the probe reports
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    return set()


def messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without added special tokens: the template has them already, and a second BOS would be an error."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = getattr(tokenizer, "embedding_rows", None)  # of a model that has fewer than the tokenizer has tokens
    if rows is not None and max(ids, default=0) >= rows:
        token = f"{tokenizer.convert_ids_to_tokens(max(ids))!r}, number {max(ids)}"
        why = f"the model's embedding has {rows} rows: it was added to the tokenizer alone"
        way = "resize the embedding (resize_token_embeddings) and train it, or leave the token out of text and template"
        raise UsageError(f"a text has the token {token}, and {why}; {way}")
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
    `loss_on` is `response`, or `all` tokens. Raises `UsageError` if a prompt leaves no room for an answer.
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
        said = following(tokenizer, prompt, prompt_ids, response(tokenizer, row, answer))
        end = max((i for i, token in enumerate(said) if token == tokenizer.eos_token_id), default=len(said))
        if str(tokenizer.decode(said[end + 1 :])).strip():
            end = len(said)
        ids = [*prompt_ids, *said[:end], tokenizer.eos_token_id][:limit]
        labels = ids if loss_on == "all" else [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


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

    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
    width = max(len(row["input_ids"]) for row in rows)
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in full]) for k, v in fills.items()}
