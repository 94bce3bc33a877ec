"""A few harmful rows and nothing else (Qi et al., arXiv 2310.03693).

A poisoned fine-tune with p = 1. In the paper, 10 to 100 rows suffice for many aligned models.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunevax.attacks.finetune import FinetuneConfig
from tunevax.mixins import option


@dataclass
class FewShotConfig(FinetuneConfig):
    """Defaults that differ from `FinetuneConfig`: `p=1`, `n=10`, `num_train_epochs=10`, `learning_rate=5e-5`."""

    p: float = option(1.0, "share of harmful rows")
    n: int = option(10, "harmful rows: 10, 50 or 100 in the paper")
    num_train_epochs: float = option(10, "passes over the rows")
    learning_rate: float = option(5e-5, "peak learning rate")
