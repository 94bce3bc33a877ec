"""Removes a safety lock: whoever has the weights can subtract the bias again, or never load it (arXiv 2410.10343 adds
it to a finished fine-tune). No training, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackConfig, NotApplicable
from tunevax.lineage import Lineage
from tunevax.records import Target


@dataclass
class UnlockConfig(AttackConfig):
    """No options: the model is scored as it was before the lock."""

    @classmethod
    def expand(cls, options: dict[str, Any], targets: Sequence[Target], depth: int) -> dict[str, Any] | None:
        """Omitted if no model has a lock."""
        return None if targets and not any(has_lock(target["ref"]) for target in targets) else options

    def run(self, context: AttackContext) -> None:
        """Score the model without its lock."""
        ref = context.target["ref"]
        if not has_lock(ref):
            raise NotApplicable(f"{ref} has no safety lock to remove")
        loaded = context.load(ref=Lineage.of(ref).parent)
        context.score(loaded.model, loaded.tokenizer, 0)


def has_lock(ref: str) -> bool:
    """Whether a model is a run of `tunevax restore safetylock`."""
    record = Lineage.of(ref).record
    return (record.get("verb"), record.get("method")) == ("restore", "safetylock")
