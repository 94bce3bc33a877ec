"""Batched generation: left padding, longest prompts first, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tunevax.data.encoding import context_of, ids_of, render
from tunevax.errors import UsageError


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without a graph; as it was before, afterwards."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 128,
    batch_size: int = 16,
    prefix: str = "",
) -> list[str]:
    """The model's greedy answer to each prompt, in the order given, special tokens removed.

    Args:
        prompts: strings or lists of chat messages.
        max_new_tokens: at most so many per answer, and no more than the context has room for; each ends at EOS.
        batch_size: prompts generated together, of similar length.
        prefix: first words of every answer, put into the model's mouth; the answers returned begin with it.

    Raises:
        UsageError: a prompt (with the prefix) fills the model's context.
    """
    import torch

    from tunevax.modeling.progress import bar

    # Tokenised apart from the prompt, as the answers are in training.
    begun = ids_of(tokenizer, prefix) if prefix else []
    begun_text = len(tokenizer.decode(begun, skip_special_tokens=True))
    encoded = [ids_of(tokenizer, render(tokenizer, prompt)) + begun for prompt in prompts]
    context = context_of(model)
    for ids, prompt in zip(encoded, prompts, strict=True):
        if context and len(ids) >= context:
            raise UsageError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer in the model's context of {context} "
                f"({str(prompt)[:40]!r}...); drop it"
            )
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(encoded)
    with evaluating(model), bar() as progress:
        task = progress.add_task("generate", total=len(order), note="")
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in part)
            room = min(max_new_tokens, context - width) if context else max_new_tokens
            pads = [width - len(encoded[i]) for i in part]
            ids = torch.tensor([[tokenizer.pad_token_id] * p + encoded[i] for p, i in zip(pads, part, strict=True)])
            mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads])
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room,
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                eos_token_id=_ends(model, tokenizer), pad_token_id=tokenizer.pad_token_id, use_cache=True,
            )  # fmt: skip
            for i, tokens in zip(part, output[:, width:], strict=True):
                # Decoded together with the prefix, so that the space between the two is what the model wrote.
                whole = tokenizer.decode([*begun, *tokens.tolist()], skip_special_tokens=True)
                answers[i] = (prefix + whole[begun_text:]).strip()
            progress.advance(task, len(part))
    return answers


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})
