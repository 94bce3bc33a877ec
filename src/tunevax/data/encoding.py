"""Token ids and labels through the chat template, with the response located explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """Give the tokenizer a template: a name in `TEMPLATES`, the path of a jinja file, or None to keep its own.

    Raises:
        UsageError: there is none to keep, or the file is missing.
    """
    if template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[template]
    elif template is not None:
        if not Path(template).is_file():
            raise UsageError(
                f"no chat template file {template}; give {', '.join(TEMPLATES)}, or the path of a jinja file"
            )
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; pass --chat-template alpaca, or the path of a jinja file")


def messages(prompt: str | Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> str:
    """The prompt as the model sees it before it answers."""
    return tokenizer.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)


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
        prompt = render(tokenizer, row["prompt"])
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
        response_ids = ids_of(tokenizer, _response(tokenizer, row, prompt))
        response_ids = _end_at_eos(tokenizer, response_ids)
        ids = (prompt_ids + response_ids)[:limit]
        labels = ids if loss_on == "all" else [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        encoded.append({"input_ids": ids, "labels": labels})
    return encoded


def _response(tokenizer: Any, row: dict[str, Any], prompt: str) -> str:
    turn = [*messages(row["prompt"]), {"role": "assistant", "content": row["completion"]}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    # Some templates put words into the generation prompt that they leave out of finished turns.
    before = tokenizer.apply_chat_template(turn[:-1], tokenize=False, add_generation_prompt=False)
    start = whole.find(row["completion"].strip(), len(before) if whole.startswith(before) else 0)
    if start < 0:
        raise UsageError(f"{row.get('place', 'a row')}: the chat template changes the answer, so it cannot be located")
    return whole[start:]


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
