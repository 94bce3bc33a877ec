"""Fine-tuning on benign rows alone, which can undo safety training too (arXiv 2310.03693).

A poisoned fine-tune with p = 0, on the benign task or on `benign_rows`, such as rows selected to erode safety (He et
al., arXiv 2404.01099). Trainability is measured by it as well.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from tunevax.attacks.context import TargetOptions
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.data.roles import load_rows
from tunevax.mixins import option
from tunevax.records import Example


@dataclass
class BenignOnlyConfig(FinetuneConfig):
    """Default that differs from `FinetuneConfig`: `p=0`."""

    p: float = option(0.0, "share of harmful rows")
    benign_rows: str | None = option(None, "rows to train on instead of --task-data, such as a benign-salient subset")

    @property
    def needs(self) -> Set[str]:
        """The data it draws from, besides `benign_rows`."""
        return super().needs - ({"task"} if self.benign_rows else set())

    def own_rows(self, options: TargetOptions) -> dict[str, list[Example]]:
        """The rows of `benign_rows`, by role."""
        return {"benign rows": load_rows("task", self.benign_rows)} if self.benign_rows else {}
