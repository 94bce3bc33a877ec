"""DSIR: data selection by importance resampling on hashed n-grams (arXiv 2302.03169).

With z_j(x) the count of bucket j among the hashed one- and two-word sequences of a row's text, p the distribution of
buckets in the target (the validation rows) and q that in the source (the pool),

    log w(x) = sum_j z_j(x) (log p_j - log q_j),      score(x) = log w(x) + Gumbel noise

The k highest scores are a sample of k rows without replacement with probabilities in proportion to w (the paper's
resampling). Two things are ours. The paper's texts are chunks of one length; our rows are not, and the sum ranks them
by length first, so log w is taken per sequence and multiplied by the mean number of sequences of a row. The paper's
target is large; ours is not, so p is half the target's and half q: a sequence that the target never has counts as
log 1/2 and not as minus infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from tunevax.data.splits import prompt_text
from tunevax.records import Example


@dataclass
class DSIRSelector:
    """Keeps rows whose words are those of the validation rows. No model."""

    output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
    seed: int = field(default=42, metadata={"help": "of the resampling"})
    buckets: int = field(default=10_000, metadata={"help": "buckets that one- and two-word sequences are hashed into"})

    needs: ClassVar[frozenset[str]] = frozenset({"validation"})
    paper: ClassVar[str] = "arXiv 2302.03169"

    def score(self, pool: Any) -> np.ndarray:
        """The log importance weight of each row with Gumbel noise, [rows]."""
        pool.passes.update(forward=0.0, backward=0.0)
        noise = np.random.RandomState(self.seed).gumbel(size=len(pool.rows))
        return log_weights(pool.rows, pool.validation, self.buckets) + noise


def log_weights(rows: Sequence[Example], target: Sequence[Example], buckets: int) -> np.ndarray:
    """log w of each row, [rows], in nats of a row of average length."""
    hashing = HashingVectorizer(
        n_features=buckets, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+", alternate_sign=False, norm=None
    )  # lower-cased words, and runs of punctuation
    source, wanted = (hashing.transform([text_of(row) for row in part]) for part in (rows, target))
    p, q = (np.asarray(counts.sum(0)).ravel() / counts.sum() for counts in (wanted, source))
    here = q > 0  # no row of the pool has any other
    ratio = np.zeros(buckets)
    ratio[here] = np.log(0.5 + 0.5 * p[here] / q[here])
    lengths = np.asarray(source.sum(1)).ravel()
    return source @ ratio / np.maximum(lengths, 1) * lengths.mean()


def text_of(row: Example) -> str:
    """Prompt and safe answer as one text."""
    return f"{prompt_text(row['prompt'])}\n{row['chosen']}"
