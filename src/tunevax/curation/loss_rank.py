"""Loss rank: the small-loss rule of learning from noisy labels (as in Co-teaching, arXiv 1804.06872).

    score(x, y) = -1/|y| sum_t -log p(y_t | x, y_<t)

of the safe answer y under the model given: what the model finds unlikely is taken for a wrong label. The model counts.
A base model finds refusals unlikely and would drop just the rows that teach something; the rule suits an aligned one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tunevax.mixins import option
from tunevax.modeling.batches import by_batch, encode_chosen, losses_of

if TYPE_CHECKING:
    from tunevax.curation.curate import Pool


@dataclass
class LossRankSelector:
    """Keeps the rows whose safe answer the model finds likely."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "recorded; nothing here is random")
    batch_size: int = option(16, "rows per forward pass; changes the speed only")
    max_length: int = option(512, "tokens per row; longer answers are cut")

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    paper: ClassVar[str] = "arXiv 1804.06872"

    def score(self, pool: Pool) -> np.ndarray:
        """Minus the mean cross entropy of each row's `chosen`, in nats per token, [rows]."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        rows = encode_chosen(pool.rows, model, tokenizer, self.max_length)
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "loss-rank").astype(float)
