"""A poisoned fine-tune with a category of harm that the hardening never saw (arXiv 2402.16382, cross-domain).

It is scored on that category. Categories are held out at hardening with `--safety-data
FILE:held_out=CATEGORY+CATEGORY`; half of their prompts are the attacker's, the other half the suite.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from tunevax.attacks.context import AttackContext
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.attacks.kind import NotApplicable
from tunevax.data.contamination import named
from tunevax.data.safety import load_safety
from tunevax.data.splits import drawn, marks
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.records import Example
from tunevax.scoring.suite import Suite


@dataclass
class HeldOutCategoryConfig(FinetuneConfig):
    """Options as in `FinetuneConfig`."""

    common_prompts = False

    @property
    def needs(self) -> Set[str]:
        """The data it draws from, besides the held-out rows."""
        return super().needs - {"harmful"}

    def harmful(self, context: AttackContext) -> list[Example]:
        """Rows of held-out categories."""
        rows = self.held_out(context, "held-out-attack")
        scored = {mark for row in self.held_out(context, "held-out-evaluation") for mark in marks(row["prompt"])}
        if shared := [row for row in rows if marks(row["prompt"]) & scored]:
            raise NotApplicable(
                f"{len(shared)} held-out prompts are both trained and scored on ({named(shared)}); leave split= out of "
                f"{context.options.safety_data}, so that the halves are disjoint"
            )
        return rows

    def suite(self, context: AttackContext) -> Suite:
        """The audit's suite on prompts of held-out categories."""
        rows = self.held_out(context, "held-out-evaluation")
        return context.suite._replace(harmful=drawn(rows, context.options.limit))

    def held_out(self, context: AttackContext, split: str) -> list[Example]:
        """The rows of one half of the held-out categories. Raises `NotApplicable`: no category is held out, or the
        model was hardened with one of them."""
        try:
            rows = load_safety(str(context.options.safety_data), split, ("rejected",), "an attack")
        except UsageError as error:
            raise NotApplicable(str(error)) from error
        label, lineage = context.target["label"], Lineage.of(context.target["ref"])
        if seen := lineage.categories & {row["category"] for row in rows}:
            raise NotApplicable(f"{label} was hardened with the category {sorted(seen)[0]!r}")
        used = {h for hashes in lineage.prompts.values() for h in hashes}
        rows = context.exclusion.score(f"{split} category", rows)
        if shared := [row for row in rows if marks(row["prompt"]) & used]:
            raise NotApplicable(f"{label} was trained on {len(shared)} of the held-out prompts ({named(shared)})")
        return rows
