"""A few harmful rows and nothing else (Qi et al., arXiv 2310.03693).

A poisoned fine-tune with p = 1. In the paper 10, 50 or 100 rows are enough for many aligned models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tunevax.attacks.finetune import FinetuneConfig


@dataclass
class FewShotConfig(FinetuneConfig):
    """Defaults that differ from `FinetuneConfig`: `p=1`, `n=10`, `num_train_epochs=10`, `learning_rate=5e-5`."""

    p: float = field(default=1.0, metadata={"help": "share of harmful rows"})
    n: int = field(default=10, metadata={"help": "harmful rows: 10, 50 or 100 in the paper"})
    num_train_epochs: float = field(default=10, metadata={"help": "passes over the rows"})
    learning_rate: float = field(default=5e-5, metadata={"help": "peak learning rate"})
