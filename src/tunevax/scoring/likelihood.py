"""Likelihood of text: the surprisal of every token, and the perplexity of a text with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.data.chat import render
from tunevax.data.encoding import context_of, ids_of
from tunevax.errors import UsageError
from tunevax.modeling.batches import collated, evaluating
from tunevax.records import Prompt, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK_TOKENS = 512
"""The length of a chunk of text, or the model's context where that is shorter."""


def surprisals(
    model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int = 16
) -> list[list[float]]:
    """The negative log-likelihood, in nats, of every token with a label, row by row; no graph. `rows` are as of
    `tunevax.data.encoding.encode`; the first token of a row has no loss. The log-softmax is fp32 and computed in
    chunks, so logits of shape [batch, tokens, vocabulary] never exist."""
    import torch

    from tunevax.modeling.blocks import unwrap
    from tunevax.modeling.loss import CHUNK_ELEMENTS, MIN_CHUNK_ROWS, last_hidden, logits_of

    stock: Any = unwrap(model)
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // stock.config.get_text_config().vocab_size)
    losses: list[list[float]] = [[] for _ in rows]
    with evaluating(model):
        for part, batch in collated(rows, pad_token_id, batch_size, stock.device):
            labels = batch.pop("labels")[:, 1:]
            counted = labels != -100
            hidden, targets = last_hidden(model, batch)[:, :-1][counted], labels[counted]
            chunks = zip(hidden.split(size), targets.split(size), strict=True)
            values = [torch.nn.functional.cross_entropy(logits_of(stock, h), t, reduction="none") for h, t in chunks]
            for i, row in zip(part, torch.cat(values).split(counted.sum(1).tolist()), strict=True):
                losses[i] = row.tolist()
    return losses


class Text(NamedTuple):
    """A text to measure perplexity on."""

    name: str  # shown in reports
    documents: Sequence[Prompt]  # plain strings, or chats, which the model's own template renders
    limit: int | None = None  # at most so many chunks, evenly spaced over the text


def load_text(source: str) -> Text:
    """Read a UTF-8 text file as one document, or `organism`: the first 200 chats of its pretraining stream. Raises
    `UsageError` for no such file, not UTF-8, or empty."""
    if source == "organism":
        from itertools import islice

        from tunevax.data.encoding import messages
        from tunevax.organism import World

        rows = islice(World().pretraining(), 200)
        return Text(source, [[*messages(r["prompt"]), {"role": "assistant", "content": r["completion"]}] for r in rows])
    try:
        text = Path(source).read_text(encoding="utf-8-sig")  # without the mark that some editors put in front
    except OSError as error:
        raise UsageError(f"cannot read {source} ({error.strerror}); perplexity needs a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise UsageError(f"{source} is empty; perplexity needs a text")
    return Text(Path(source).name, [text])


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, batch_size: int = 16) -> Score:
    """exp of the mean negative log-likelihood per token. Raises `UsageError` if the text has no token to score.

    Documents are cut into chunks of at most 512 tokens, or the model's context; none overlap. Each begins with the
    tokenizer's BOS; without one, the first token of a chunk is context only.

    Returns:
        value, n (tokens scored), low and high: the 95 % t interval over the chunks' means, exponentiated. Chunks count
        by their tokens (the ratio estimator; the plain t interval for equal lengths). None for a single chunk.
    """
    import numpy as np
    from scipy import stats

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = min(context_of(model) or CHUNK_TOKENS, CHUNK_TOKENS) - len(start)
    chunks = []
    for document in text.documents:
        whole = document if isinstance(document, str) else render(tokenizer, document, generate=False)
        ids = ids_of(tokenizer, whole)
        ids = ids[1:] if start and ids[:1] == start else ids
        chunks += [start + ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [{"input_ids": ids, "labels": ids} for ids in chunks if len(ids) > 1]
    taken = min(text.limit or len(rows), len(rows))
    rows = [rows[i * len(rows) // taken] for i in range(taken)]
    losses = surprisals(model, rows, tokenizer.pad_token_id, batch_size)
    if not losses:
        raise UsageError(f"{text.name} has no token to score; perplexity needs a longer text")
    sums, counts = np.array([sum(row) for row in losses]), np.array([len(row) for row in losses])
    mean = float(sums.sum() / counts.sum())
    low = high = None
    if len(losses) > 1:
        around = mean + (sums - mean * counts) / counts.mean()
        half = float(stats.t.ppf(0.975, len(losses) - 1) * stats.sem(around))  # t.interval gives nan for 0
        low, high = _exp(mean - half), _exp(mean + half)
    return {"value": _exp(mean), "n": int(counts.sum()), "low": low, "high": high}


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # finite, for JSON, even for a collapsed model
