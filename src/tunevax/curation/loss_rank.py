"""Loss rank: the small-loss rule of learning from noisy labels (as in Co-teaching, arXiv 1804.06872).

    score(x, y) = -1/|y| sum_t -log p(y_t | x, y_<t)

of the safe answer y under the given model: unlikely answers are taken for wrong labels. The choice of model matters: a
base model gives refusals a low likelihood and would drop the rows that teach most; the rule suits an aligned model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tunevax.curation.curate import ForwardOptions, Pool
from tunevax.modeling.batches import by_batch, encode_chosen, losses_of


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
