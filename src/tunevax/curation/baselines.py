"""Simple selectors to compare with: a random subset, and two ranks by the likelihood of the safe answer.

    loss-rank      score(x, y) = -1/|y| sum_t -log p(y_t | x, y_<t)     (as in Co-teaching, arXiv 1804.06872)
    perplexity     score(y)    = -1/|y| sum_t -log p(y_t | y_<t)        (as in CCNet, arXiv 1911.00359)

of the safe answer y under the given model. Loss rank is the small-loss rule of learning from noisy labels: unlikely
answers are taken for wrong labels. The choice of model matters: a base model gives refusals a low likelihood and would
drop the rows that teach most; the rule suits an aligned model. Perplexity is the filter of web-text pipelines, without
the prompt: degenerate text is dropped, a fluent answer to another question is kept. CCNet uses an n-gram model of clean
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tunevax.curation.curate import ForwardOptions, Pool
from tunevax.data.encoding import context_of, ids_of
from tunevax.mixins import option
from tunevax.modeling.batches import by_batch, encode_chosen, losses_of


@dataclass
class RandomSelector:
    """A score drawn for each row, from the seed alone."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the scores")
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""

    def score(self, pool: Pool) -> np.ndarray:
        """Independent numbers in [0, 1), [rows]; a row's number depends on the seed and its position only."""
        # numpy has frozen RandomState's stream, so a seed gives the same rows in every version.
        return np.random.RandomState(self.seed).random_sample(len(pool.rows))


@dataclass
class LossRankSelector(ForwardOptions):
    """Keeps the rows whose safe answer is likely under the model."""

    paper: ClassVar[str] = "arXiv 1804.06872"

    def score(self, pool: Pool) -> np.ndarray:
        """Minus the mean cross entropy of each row's `chosen`, in nats per token, [rows]."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        rows = encode_chosen(pool.rows, model, tokenizer, self.max_length)
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "loss-rank").astype(float)


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
        answers = [[first, *ids_of(tokenizer, row["chosen"] or "")][:limit] for row in pool.rows]
        rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in answers]
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "perplexity").astype(float)
