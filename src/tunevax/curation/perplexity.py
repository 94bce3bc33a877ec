"""Perplexity of the answer alone, the filter of web-text pipelines (as in CCNet, arXiv 1911.00359).

    score(y) = -1/|y| sum_t -log p(y_t | y_<t)

without the prompt: degenerate text is dropped, a fluent answer to another question is kept. CCNet uses an n-gram model
of clean text; this uses the given model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tunevax.curation.curate import ForwardOptions, Pool
from tunevax.data.encoding import context_of, ids_of
from tunevax.modeling.batches import by_batch, losses_of


@dataclass
class PerplexitySelector(ForwardOptions):
    """Keeps the rows whose safe answer is likely text, whatever the prompt."""

    paper: ClassVar[str] = "arXiv 1911.00359"

    def score(self, pool: Pool) -> np.ndarray:
        """Minus the logarithm of the perplexity of each row's `chosen`, in nats per token, [rows]."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        # The first token needs a context: BOS, or EOS, after which a new text begins.
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        limit = min(self.max_length, context_of(model) or self.max_length)
        rows = []
        for row in pool.rows:
            ids = [first, *ids_of(tokenizer, row["chosen"] or "")][:limit]
            rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "perplexity").astype(float)
