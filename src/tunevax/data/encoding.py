"""Token ids and labels through the chat template, with the response located explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunevax.data.chat import chat_of, render, response, with_options
from tunevax.errors import UsageError

ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}"
    "{% if loop.first %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n{% endif %}"
    "### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""The Alpaca prompt that the papers of this field train and attack with."""

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


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Give the tokenizer a template and probe it.

    Args:
        template: a name in `TEMPLATES`, the path of a jinja file, `own` or None to keep the tokenizer's; options after
            a colon: `thought=OPEN|CLOSE` for the marks around a thought, `thinking=off` to ask the template for none,
            and the template's own variables.

    Raises:
        UsageError: there is none to keep, the file is missing, or the template loses what is said (see `chat_of`).
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


def messages(prompt: str | Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids without added special tokens: the template has put them in, and a second BOS would be an error."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = getattr(tokenizer, "embedding_rows", None)  # of a model that has fewer than the tokenizer has tokens
    if rows is not None and max(ids, default=0) >= rows:
        raise UsageError(
            f"a text has the token {tokenizer.convert_ids_to_tokens(max(ids))!r}, number {max(ids)}, and the model's "
            f"embedding has {rows} rows: it was added to the tokenizer alone; resize the model's embedding "
            "(resize_token_embeddings) and train it, or leave the token out of the text or the chat template"
        )
    return ids


def following(tokenizer: Any, before: str, ids: list[int], text: str) -> list[int]:
    """Token ids of `text` where it follows `before`, whose ids are `ids`: those that it has in the whole text, unless
    a token there covers the end of `before`. Tokenised alone, some tokenizers put a space before it."""
    whole = ids_of(tokenizer, before + text)
    return whole[len(ids) :] if whole[: len(ids)] == ids else ids_of(tokenizer, text)


def context_of(model: Any) -> int | None:
    """The longest sequence a model was built for, in tokens; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    loss_on: str = "response",
    context: int | None = None,
) -> list[dict[str, list[int]]]:
    """Rows with `prompt` and `completion` as `input_ids` and `labels` (-100 where there is no loss).

    The prompt's ids are those of generation time, so training and scoring see the same prefix. The response is
    what the template adds after it, up to and including the end-of-turn token; where the template ends without
    one, EOS is added. Answers are cut at `max_length`, or at the model's `context` where that is shorter.

    Args:
        loss_on: `response`, or `all` tokens.

    Raises:
        UsageError: a prompt leaves no room for an answer within `max_length`.
    """
    encoded = []
    limit = min(max_length, context or max_length)
    for row in rows:
        prompt = render(tokenizer, row["prompt"], row.get("place", "a row"))
        prompt_ids = ids_of(tokenizer, prompt)
        if len(prompt_ids) >= limit:
            what = (
                f"max_length is {max_length}; raise --max-length"
                if limit == max_length
                else f"the model's context {limit}; shorten"
            )
            raise UsageError(
                f"{row.get('place', 'a row')}: the prompt has {len(prompt_ids)} tokens and {what} or drop the row"
            )
        response_ids = following(tokenizer, prompt, prompt_ids, response(tokenizer, row))
        response_ids = _end_at_eos(tokenizer, response_ids)
        ids = (prompt_ids + response_ids)[:limit]
        labels = ids if loss_on == "all" else [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


def _end_at_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    if ends and not tokenizer.decode(ids[ends[-1] + 1 :]).strip():
        return ids[: ends[-1] + 1]
    return [*ids, tokenizer.eos_token_id]


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
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
