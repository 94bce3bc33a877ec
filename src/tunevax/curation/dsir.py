"""DSIR: data selection by importance resampling on hashed n-grams (arXiv 2302.03169).

With z_j(x) the count of bucket j among the hashed one- and two-word sequences of a row's text, p the distribution of
buckets in the target (the validation rows) and q that in the source (the pool),

    log w(x) = sum_j z_j(x) (log p_j - log q_j),      score(x) = log w(x) + Gumbel noise

The k highest scores are a sample of k rows without replacement with probabilities in proportion to w (the paper's
resampling). Two deviations: the paper's texts all have one length and ours do not, so that the sum would rank them by
length first; log w is the mean per sequence times the mean number of sequences of a row. The paper's target is large
and ours is not, so p is half the target's and half q: a sequence absent from the target counts as log 1/2 and not as
minus infinity.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from tunevax.curation.curate import Pool
from tunevax.data.splits import prompt_text
from tunevax.mixins import option
from tunevax.records import Example


@dataclass
class DSIRSelector:
    """Keeps rows with the words of the validation rows. No model."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the resampling")
    buckets: int = option(10_000, "buckets that one- and two-word sequences are hashed into")
    needs: ClassVar[frozenset[str]] = frozenset({"validation"})
    paper: ClassVar[str] = "arXiv 2302.03169"

    def score(self, pool: Pool) -> np.ndarray:
        """The log importance weight of each row with Gumbel noise, [rows]."""
        noise = np.random.RandomState(self.seed).gumbel(size=len(pool.rows))
        return log_weights(pool.rows, pool.validation, self.buckets) + noise


def log_weights(rows: Sequence[Example], target: Sequence[Example], buckets: int) -> np.ndarray:
    """log w of each row, [rows], in nats of a row of average length."""
    source, wanted = (
        [hashed(f"{prompt_text(row['prompt'])}\n{row['chosen']}", buckets) for row in part] for part in (rows, target)
    )
    p, q = (np.bincount(np.concatenate(part), minlength=buckets) for part in (wanted, source))
    here = q > 0  # the buckets of the pool
    ratio = np.zeros(buckets)
    ratio[here] = np.log(0.5 + 0.5 * (p[here] / p.sum()) / (q[here] / q.sum()))
    means = [ratio[row].mean() if len(row) else 0.0 for row in source]
    return np.array(means) * np.mean([len(row) for row in source])


def hashed(text: str, buckets: int) -> np.ndarray:
    """The bucket of each one- and two-word sequence in lower case, [sequences]; a run of punctuation is a word too."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    sequences = (*words, *map(" ".join, itertools.pairwise(words)))
    return np.array([abs(murmur3(sequence)) % buckets for sequence in sequences], np.int64)


@cache
def murmur3(text: str) -> int:
    """MurmurHash3 (x86, 32 bits, seed 0) of the UTF-8 bytes, signed. Python's `hash` differs between processes."""
    data, mask, value = text.encode(), 2**32 - 1, 0
    for at in range(0, len(data), 4):
        block = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & mask
        value ^= (block << 15 | block >> 17) * 0x1B873593 & mask
        if at + 4 <= len(data):
            value = ((value << 13 | value >> 19) * 5 + 0xE6546B64) & mask
    value ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        value = (value ^ value >> shift) * factor & mask
    return value - 2**32 if value >> 31 else value
