"""Batched greedy generation: left padding, longest prompts first; answers that have ended leave their batch.

It is `model.generate` of transformers, so the model's generation config (a repetition penalty, suppressed tokens) holds
on any architecture. It stops whenever a quarter of a batch has ended, and continues with the other rows of the
key-value cache; stock generation keeps every row until the longest answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunevax.data.chat import chat_of, mouth, render
from tunevax.data.encoding import context_of, following, ids_of
from tunevax.data.thoughts import END, joined, marked_thought, split_thought
from tunevax.errors import UsageError
from tunevax.modeling.batches import evaluating
from tunevax.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 2**15
"""At most so many rows times tokens in a batch, which bounds the key-value cache: 16 GiB for Llama 2 7B in bf16, which
has no grouped heads; 4 GiB for Llama 3 8B."""
FROM_THE_FIRST = {
    "min_length": (None, 0), "min_new_tokens": (None, 0), "begin_suppress_tokens": (None, []),
    "forced_eos_token_id": (None,), "exponential_decay_length_penalty": (None,),
    "encoder_repetition_penalty": (None, 1), "guidance_scale": (None, 1),
}  # fmt: skip
"""Settings of a generation config, with their values when off, that count from an answer's first token or keep a state,
so generation cannot be stopped and continued. A model that has one of them answers one prompt at a time."""
GREEDY = {
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "temperature": None,
    "top_p": None, "top_k": None, "penalty_alpha": None, "dola_layers": None, "diversity_penalty": None,
    "constraints": None, "force_words_ids": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "is_assistant": False, "use_mtp": False, "token_healing": False, "max_time": None, "stop_strings": None,
    "use_cache": True, "return_dict_in_generate": True,
}  # fmt: skip
"""Generation is greedy and without a time limit whatever the generation config says. Stop strings are matched here."""
CACHES = (None, "static", "dynamic", "hybrid")
"""Kinds of cache that a generation config may request. For others, which save memory, need further packages or a GPU,
and give the same answers or worse, the default one is used."""


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int = 128,
    batch_size: int = 128, prefix: str | Sequence[str] = "", places: Sequence[str] | None = None,
) -> list[str]:  # fmt: skip
    """The model's greedy answer to each prompt, in the order given, special tokens removed; a thought before it is
    marked as in `tunevax.data.thoughts.marked_thought`. Raises `UsageError` if a prompt (with the prefix) fills the
    model's context, or the chat template refuses it.

    Args:
        max_new_tokens: at most so many per answer, and no more than the context has room for; each ends at EOS, or at
            a stop string of the generation config.
        batch_size: prompts generated together, of similar length; fewer where they are long (`TOKENS`).
        prefix: prefilled first words of every answer, or of each; the answers returned begin with it.
        places: the source of each prompt, for error messages.
    """
    from tunevax.console import bar

    prefixes = [prefix] * len(prompts) if isinstance(prefix, str) else prefix
    encoded, rooms, begun = encoded_prompts(model, tokenizer, prompts, max_new_tokens, prefixes, places)
    if any(getattr(model.generation_config, name, None) not in off for name, off in FROM_THE_FIRST.items()):
        batch_size = 1
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(encoded)
    with evaluating(model), bar() as progress:
        task = progress.add_task("generate", total=len(order), note="")
        while order:
            rows = max(1, min(batch_size, TOKENS // (len(encoded[order[0]]) + max_new_tokens)))
            part, order = order[:rows], order[rows:]
            outputs = _batch(model, tokenizer, [encoded[i] for i in part], [rooms[i] for i in part])
            for i, tokens in zip(part, outputs, strict=True):
                answers[i] = answer(tokenizer, begun[i], tokens, prefixes[i])
            progress.advance(task, len(part))
    return answers


def encoded_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int,
    prefixes: Sequence[str], places: Sequence[str] | None = None,
) -> tuple[list[list[int]], list[int], list[list[int]]]:  # fmt: skip
    """Token ids of each prompt with its prefix, the most tokens that its answer may have, and the prefix's own ids. A
    prefix begins the answer: in a template with thoughts it comes after an empty one. Raises as `generate`."""
    encoded, begun, context = [], [], context_of(model)
    for prompt, prefix, place in zip(prompts, prefixes, places or ["a prompt"] * len(prompts), strict=True):
        text = render(tokenizer, prompt, place)
        ids = ids_of(tokenizer, text)
        # As the answers are in training.
        begun.append(following(tokenizer, text, ids, mouth(tokenizer, prompt, place) + prefix) if prefix else [])
        encoded.append(ids + begun[-1])
        if context and len(encoded[-1]) >= context:
            full = f"in the model's context of {context} ({str(prompt)[:40]!r}...)"
            length = f"a length of {len(encoded[-1])} tokens"
            raise UsageError(f"{place}: {length} leaves no room for an answer {full}; drop it")
    return encoded, [min(max_new_tokens, context - len(ids)) if context else max_new_tokens for ids in encoded], begun


def answer(tokenizer: PreTrainedTokenizerBase, begun: list[int], tokens: list[int], prefix: str) -> str:
    """The text of an answer's tokens after a prefix, whose ids are `begun`, with a thought before it."""
    # The marks may be special tokens. A prefix comes after the thought that the generation prompt opens.
    written = str(tokenizer.decode(tokens, skip_special_tokens=False))
    chat = chat_of(tokenizer)
    marked = marked_thought(written, chat.thought, chat.opened and not prefix)
    thought, said = split_thought(marked)
    if thought is not None:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for special in sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True):
            thought, said = thought.replace(special, ""), said.replace(special, "")
        thought, said = thought.strip(), said.strip()
        return joined(thought, f"{prefix} {said}".strip() if said else "", ended=END in marked)
    # Decoded together with the prefix, which keeps the model's own space between the two.
    whole = str(tokenizer.decode([*begun, *tokens], skip_special_tokens=True))
    return (prefix + whole[len(tokenizer.decode(begun, skip_special_tokens=True)) :]).strip()


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(ends - {None})


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], rooms: Sequence[int]
) -> list[list[int]]:
    """The new tokens of each prompt, the one that ends it included; `rooms[i]` of them at most."""
    import torch
    from transformers import DynamicCache, StoppingCriteriaList

    pad, ends, width = tokenizer.pad_token_id, ends_of(model, tokenizer), max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad] * n + prompt for n, prompt in zip(pads, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=model.device)
    left, limits = torch.arange(len(ids), device=model.device), torch.tensor(rooms, device=model.device) + width
    answers: list[list[int]] = [[]] * len(ids)
    # With any other kind of cache, earlier tokens are computed again for the rows that continue.
    kind = model.generation_config.cache_implementation
    can_select = kind not in CACHES or kind in (None, "hybrid")  # hybrid: transformers drops it
    settings = GREEDY if kind in CACHES else {**GREEDY, "cache_implementation": None}
    stops, cache = model.generation_config.stop_strings or [], None
    stops = [stops] if isinstance(stops, str) else stops

    def stopped(tokens: list[int]) -> bool:
        return any(stop in str(tokenizer.decode(tokens)) for stop in stops)

    while len(left):
        ended = torch.zeros_like(left, dtype=torch.bool)

        def enough(so_far: torch.Tensor, _scores: object, ended: torch.Tensor = ended) -> torch.Tensor:
            ended |= torch.isin(so_far[:, -1], torch.tensor(ends, device=so_far.device))
            if stops:
                ended |= torch.tensor([stopped(row) for row in so_far[:, width:].tolist()], device=so_far.device)
            return (4 * ended.sum() >= len(ended)).expand(len(ended))

        output = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=int(limits.min()) - ids.shape[1],
            eos_token_id=ends, pad_token_id=pad, stopping_criteria=StoppingCriteriaList([enough]), **settings,
        )  # fmt: skip
        ids = output.sequences
        done = ended | (limits <= ids.shape[1])
        for row, tokens in zip(left[done].tolist(), ids[done, width:].tolist(), strict=True):
            over = (n for n in range(1, len(tokens) + 1) if tokens[n - 1] in ends or stopped(tokens[:n]))
            answers[row] = tokens[: next(over, len(tokens))]
        keep = (~done).nonzero()[:, 0]
        left, limits, ids = left[keep], limits[keep], ids[keep]
        mask = torch.nn.functional.pad(mask[keep], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache = getattr(output, "past_key_values", None)
        cache = cache if can_select and isinstance(cache, DynamicCache) else None
        if cache is not None:
            cache.reorder_cache(keep)  # as in beam search: every kind of layer has it, attention or not
    return answers
