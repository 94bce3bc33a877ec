"""Fine-tuning on harmless rows alone, which can undo safety training too (arXiv 2310.03693).

A poisoned fine-tune with p = 0, on the benign task or on `benign_rows`, such as rows picked to erode safety (He et al.,
arXiv 2404.01099). It is also where trainability is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunevax.attacks.context import AttackContext, TargetOptions
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.data.mixing import mix
from tunevax.data.tasks import load_task


@dataclass
class BenignOnlyConfig(FinetuneConfig):
    """Default that differs from `FinetuneConfig`: `p=0`."""

    p: float = field(default=0.0, metadata={"help": "share of harmful rows"})
    benign_rows: str | None = field(
        default=None, metadata={"help": "rows to train on instead of --task-data, such as a benign-salient subset"}
    )

    @property
    def needs(self) -> set[str]:
        """The data it draws from."""
        return super().needs - ({"task"} if self.benign_rows else set())

    def own_rows(self, options: TargetOptions) -> dict[str, list[dict[str, Any]]]:
        """The rows of `benign_rows`, by role."""
        return {"benign rows": load_task(self.benign_rows, "train").rows} if self.benign_rows else {}

    def rows(self, context: AttackContext) -> list[dict[str, Any]]:
        """Benign rows only."""
        if self.benign_rows is None:
            return super().rows(context)
        ((role, rows),) = self.own_rows(context.options).items()
        return mix(context.exclusion.benign(role, rows), [], 0.0, self.n, self.seed)
