"""Perplexity of the answer alone, the filter of web-text pipelines (as in CCNet, arXiv 1911.00359).

    score(y) = -1/|y| sum_t -log p(y_t | y_<t)

without the prompt: gibberish and broken text go, a fluent answer to another question stays. CCNet measures with an
n-gram model of clean text; here the model given does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tunevax.data.encoding import context_of, ids_of
from tunevax.mixins import option
from tunevax.modeling.batches import by_batch, losses_of

if TYPE_CHECKING:
    from tunevax.curation.curate import Pool


@dataclass
class PerplexitySelector:
    """Keeps the rows whose safe answer is likely text, whatever was asked."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "recorded; nothing here is random")
    batch_size: int = option(16, "rows per forward pass; changes the speed only")
    max_length: int = option(512, "tokens per answer; longer ones are cut")

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    paper: ClassVar[str] = "arXiv 1911.00359"

    def score(self, pool: Pool) -> np.ndarray:
        """Minus the logarithm of the perplexity of each row's `chosen`, in nats per token, [rows]."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        # Something has to stand before the first token: without a BOS, EOS, after which a new text begins.
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        limit = min(self.max_length, context_of(model) or self.max_length)
        rows = []
        for row in pool.rows:
            ids = [first, *ids_of(tokenizer, row["chosen"])][:limit]
            rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "perplexity").astype(float)
